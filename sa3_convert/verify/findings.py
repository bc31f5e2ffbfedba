"""Everything that a verification found: the one shape that `--json`, `--report` and `drift` read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sa3_convert.components import Component
from sa3_convert.errors import VerificationError
from sa3_convert.runtime.engines import EngineName
from sa3_convert.verify.bisect_result import BisectResult
from sa3_convert.verify.distribution import FREE_RUNNING, GenerationFidelity, component_of
from sa3_convert.verify.distribution_result import Distribution
from sa3_convert.verify.end_to_end import EndToEnd
from sa3_convert.verify.result import BundleFidelity, advice


@dataclass(frozen=True, slots=True)
class Findings:
    """A verification's results; a part that was not asked for is None or empty."""

    bundle: BundleFidelity
    """Each model on sampled inputs, against its floor."""
    engine: EngineName = "mnn"
    """What the whole generations ran on: MNN, or ONNX Runtime with 8-bit integers."""
    generations: GenerationFidelity | None = None
    """Each component over whole generations, the DiT per step."""
    end_to_end: EndToEnd | None = None
    """From prompt to audio, beside the chaos floor."""
    bisections: Mapping[Component, BisectResult] = field(default_factory=dict)
    """Of components that fell short."""

    @property
    def short(self) -> Mapping[Component, Distribution]:
        """Components whose own error is below the floor in a generation, with the distribution that shows it.

        Free-running generations have no floor: errors of the whole chain feed on themselves there.
        """
        own = [] if self.generations is None else self.generations.distributions
        return {
            component_of(d.name): d
            for d in own
            if d.name != FREE_RUNNING and d.summary.worst < self._floors[component_of(d.name)]
        }

    @property
    def _floors(self) -> Mapping[Component, float]:
        return {v.fidelity.component: v.floor_db for v in self.bundle.verdicts if v.engine == self.engine}

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a sentence each."""
        sampled = [problem for verdict in self.bundle.verdicts for problem in verdict.problems]
        for component, distribution in self.short.items():
            found = distribution.summary
            step = "" if found.worst_step is None else f" step={found.worst_step}"
            floor = self._floors[component]
            sampled.append(
                f"{component.value}: generation {found.worst_case}{step} has {found.worst:.2f} dB, the floor is "
                f"{floor:g} dB.{advice(found.worst, floor)}"
            )
        return tuple(sampled)

    @property
    def passed(self) -> bool:
        """Whether every model reached its floor, on sampled inputs and in every generation."""
        return not self.problems

    def check(self) -> None:
        """Raise VerificationError naming every model that falls short."""
        if problems := self.problems:
            raise VerificationError("\n".join(problems))

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data: that of the bundle, and each further part under its own name."""
        parts: dict[str, Any] = {
            "engine": self.engine,
            "passed": self.passed,
            "problems": list(self.problems),
            "generations": None if self.generations is None else self.generations.to_data(),
            "end_to_end": None if self.end_to_end is None else self.end_to_end.to_data(),
            "bisections": {component.value: found.to_data() for component, found in self.bisections.items()},
        }
        return self.bundle.to_data() | parts
