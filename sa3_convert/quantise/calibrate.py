"""The inputs that a component is calibrated with."""

from typing import TYPE_CHECKING, Final

from sa3_convert.components import Component
from sa3_convert.verify.inputs import Sample, sample_inputs

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

CALIBRATION_SEED: Final = 1000
"""First seed of calibration; verification uses small ones, so nothing is judged on what it was made from."""
CHECK_SEED: Final = 2000
"""First seed of the samples on which rounding proves itself."""
_RUNS: Final = {Component.TEXT_ENCODER: 32, Component.DIT: 16}
_OTHER_RUNS: Final = 4


def calibration_samples(
    component: Component, checkpoint: "Checkpoint", *, first_seed: int = CALIBRATION_SEED
) -> list[Sample]:
    """Return inputs that are not among those of any verification."""
    latents = 0 if component is Component.TEXT_ENCODER else 64
    seeds = range(first_seed, first_seed + _RUNS.get(component, _OTHER_RUNS))
    return [sample_inputs(component, checkpoint.layout, seed=seed, latents=latents) for seed in seeds]
