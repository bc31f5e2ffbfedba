"""What a verification found: per case and output, summed up per component and per bundle, judged by a floor."""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

from sa3_convert.check.metrics import Fidelity, Sums
from sa3_convert.components import Component
from sa3_convert.errors import VerificationError
from sa3_convert.runtime.engines import EngineName


@dataclass(frozen=True, slots=True)
class Measurement:
    """One output (or region of it) for one case."""

    case: str
    """Says how to make the inputs again."""
    output: str
    sums: Sums

    @property
    def fidelity(self) -> Fidelity:
        """The figures of this output alone."""
        return self.sums.fidelity()


ADVISED_WITHIN_DB = 3.0
"""A ratio this far below its floor may be what the weights' statistics cost; one further down is a defect."""


def advice(ratio_db: float, floor_db: float) -> str:
    """Return what to do about a ratio below a floor, as the end of a message."""
    passing = math.floor(ratio_db * 10) / 10
    if passing > 0 and ratio_db >= floor_db - ADVISED_WITHIN_DB:
        return f" It would pass with floor_db: {passing:g}."
    return " That is too far below for another floor: give its layers more bits, or look for what is broken."


def _worst(figures: Sequence[Fidelity]) -> Fidelity:
    return Fidelity(
        min(f.signal_to_noise_db for f in figures),
        min(f.cosine for f in figures),
        max(f.max_abs_error for f in figures),
        max(f.mean_abs_error for f in figures),
    )


@dataclass(frozen=True, slots=True)
class ComponentFidelity:
    """All measurements of one component; there is at least one."""

    component: Component
    measurements: tuple[Measurement, ...]

    def __post_init__(self) -> None:
        if not self.measurements:
            raise VerificationError(f"{self.component.value}: nothing was compared.")

    @property
    def worst_case(self) -> Measurement:
        """The measurement with the lowest signal-to-noise ratio."""
        return min(self.measurements, key=lambda m: m.fidelity.signal_to_noise_db)

    @property
    def worst(self) -> Fidelity:
        """The worst of each figure; they need not be of the same case."""
        return _worst([m.fidelity for m in self.measurements])

    @property
    def mean(self) -> Fidelity:
        """The mean of each figure over the cases, each by its worst output: a constant one would flatter it."""
        cases: dict[str, list[Fidelity]] = {}
        for measurement in self.measurements:
            cases.setdefault(measurement.case, []).append(measurement.fidelity)
        worst = [_worst(figures) for figures in cases.values()]

        def mean(values: Sequence[float]) -> float:
            return math.fsum(values) / len(values)

        return Fidelity(
            mean([f.signal_to_noise_db for f in worst]),
            mean([f.cosine for f in worst]),
            mean([f.max_abs_error for f in worst]),
            mean([f.mean_abs_error for f in worst]),
        )

    @property
    def pooled(self) -> Fidelity:
        """The figures over all elements of all cases taken as one array."""
        return reduce(add, (m.sums for m in self.measurements)).fidelity()

    def over(self, cases: Collection[str]) -> "ComponentFidelity":
        """Return the measurements of some cases."""
        return ComponentFidelity(self.component, tuple(m for m in self.measurements if m.case in cases))

    def shortfall(self, floor_db: float) -> str | None:
        """Return what is wrong if the worst signal-to-noise ratio is below the floor, else None."""
        worst = self.worst_case
        ratio = worst.fidelity.signal_to_noise_db
        if ratio >= floor_db:
            return None
        return (
            f"{self.component.value}: {worst.output} of case {worst.case} has {ratio:.2f} dB, the floor is "
            f"{floor_db:g} dB.{advice(ratio, floor_db)}"
        )

    def check_floor(self, floor_db: float) -> None:
        """Raise VerificationError if the worst case is below the floor."""
        if (problem := self.shortfall(floor_db)) is not None:
            raise VerificationError(problem)

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data: worst, mean and pooled figures and every case."""
        worst = self.worst_case
        return {
            "component": self.component.value,
            "worst": asdict(self.worst),
            "worst_case": {"case": worst.case, "output": worst.output},
            "mean": asdict(self.mean),
            "pooled": asdict(self.pooled),
            "cases": [{"case": m.case, "output": m.output, **asdict(m.fidelity)} for m in self.measurements],
        }


CLAIM_CEILING_DB = 80.0
"""Above this the figures are rounding of float arithmetic, which differs between machines."""
CLAIM_SLACK_DB = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """A component's figures beside what was asked of it and what its bundle claims."""

    fidelity: ComponentFidelity
    floor_db: float
    precision: str
    claimed_db: float | None = None
    """The manifest's ratio, measured on the quick cases when the model was converted."""
    measured_db: float | None = None
    """The ratio on the same cases now."""
    engine: EngineName = "mnn"
    """What runs the model: a bundle can hold one for MNN and one for ONNX Runtime's integers."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a sentence each."""
        found = [self.fidelity.shortfall(self.floor_db)]
        if self.claimed_db is not None and self.measured_db is not None:
            least = min(self.claimed_db, CLAIM_CEILING_DB) - CLAIM_SLACK_DB
            if self.measured_db < least:
                found.append(
                    f"{self.fidelity.component.value}: the manifest claims {self.claimed_db:.2f} dB, the same inputs "
                    f"now give {self.measured_db:.2f} dB. Its figures are not of this file; convert again."
                )
        return tuple(problem for problem in found if problem is not None)

    @property
    def passed(self) -> bool:
        """Whether the worst case reaches the floor and the manifest's claim is true."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class BundleFidelity:
    """The verdicts on a bundle's models."""

    bundle: str
    recipe: str
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether every model passed."""
        return all(v.passed for v in self.verdicts)

    def check(self) -> None:
        """Raise VerificationError naming every model that falls short."""
        problems = [problem for verdict in self.verdicts for problem in verdict.problems]
        if problems:
            raise VerificationError("\n".join(problems))

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data (`verify --json`): `bundle`, `recipe`, `passed`, `components`."""
        return {
            "bundle": self.bundle,
            "recipe": self.recipe,
            "passed": self.passed,
            "components": [
                {
                    "engine": v.engine,
                    "precision": v.precision,
                    "floor_db": v.floor_db,
                    "claimed_db": v.claimed_db,
                    "passed": v.passed,
                    "problems": list(v.problems),
                    **v.fidelity.to_data(),
                }
                for v in self.verdicts
            ],
        }
