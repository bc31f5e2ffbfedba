"""Fidelity as a distribution: over prompts, seeds, durations and steps, the worst case by name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sa3_convert.errors import VerificationError
from sa3_convert.verify.metrics import Fidelity


@dataclass(frozen=True, slots=True)
class Observation:
    """One comparison."""

    case: str
    fidelity: Fidelity
    step: int | None = None
    """Of the denoising loop, counted from 0."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Signal-to-noise ratios in dB, over all observations."""

    count: int
    mean: float
    percentile_5: float
    worst: float
    worst_case: str
    worst_step: int | None


@dataclass(frozen=True, slots=True)
class Distribution:
    """All observations of one quantity; there is at least one."""

    name: str
    observations: tuple[Observation, ...]

    def __post_init__(self) -> None:
        if not self.observations:
            raise VerificationError(f"{self.name}: nothing was compared.")

    @property
    def summary(self) -> Summary:
        """Mean, 5 % and worst."""
        ratios = np.array([o.fidelity.signal_to_noise_db for o in self.observations])
        worst = self.observations[int(ratios.argmin())]
        return Summary(
            count=ratios.size,
            mean=float(ratios.mean()),
            percentile_5=float(np.percentile(ratios, 5)),
            worst=float(ratios.min()),
            worst_case=worst.case,
            worst_step=worst.step,
        )

    def by_step(self) -> Mapping[int, float]:
        """Return the mean ratio of each denoising step; empty for what has no steps."""
        steps = sorted({o.step for o in self.observations if o.step is not None})
        return {
            step: float(np.mean([o.fidelity.signal_to_noise_db for o in self.observations if o.step == step]))
            for step in steps
        }

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data: summary, per-step means, and every observation."""
        return {
            "name": self.name,
            **asdict(self.summary),
            "by_step": {str(step): ratio for step, ratio in self.by_step().items()},
            "observations": [{"case": o.case, "step": o.step, **asdict(o.fidelity)} for o in self.observations],
        }
