"""Everything that a verification found: the one shape that `--json`, `--report` and `drift` read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sa3_convert.components import Component
from sa3_convert.runtime.engines import EngineName
from sa3_convert.verify.bisect_result import BisectResult
from sa3_convert.verify.distribution import GenerationFidelity
from sa3_convert.verify.end_to_end import EndToEnd
from sa3_convert.verify.result import BundleFidelity


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

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data: that of the bundle, and each further part under its own name."""
        parts: dict[str, Any] = {
            "engine": self.engine,
            "generations": None if self.generations is None else self.generations.to_data(),
            "end_to_end": None if self.end_to_end is None else self.end_to_end.to_data(),
            "bisections": {component.value: found.to_data() for component, found in self.bisections.items()},
        }
        return self.bundle.to_data() | parts
