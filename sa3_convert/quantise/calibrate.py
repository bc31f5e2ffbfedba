"""Calibration of one component: which inputs, and what of them is kept."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from sa3_convert.components import Component
from sa3_convert.quantise.calibration import collect_moments
from sa3_convert.quantise.moments import Calibration
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


def calibrate(
    reference: Path, component: Component, checkpoint: "Checkpoint", path: Path, *, threads: int | None = None
) -> Calibration:
    """Run the reference on two sets of samples and keep the moments of each.

    Args:
        reference: fp32 ONNX, as exported.
        component: what it computes.
        checkpoint: whose layout the samples have.
        path: the safetensors file to write.
        threads: for ONNX Runtime.

    Raises:
        ModelFileError: the reference cannot be loaded or run.

    """
    fit, check = (
        collect_moments(reference, calibration_samples(component, checkpoint, first_seed=seed), threads=threads)
        for seed in (CALIBRATION_SEED, CHECK_SEED)
    )
    return Calibration.write(path, fit, check)
