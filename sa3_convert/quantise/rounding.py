"""Rounding with what calibration knows of a layer's inputs, where that is measured to help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from sa3_convert.quantise.calibration import Moments
from sa3_convert.quantise.compensated import round_error_compensated
from sa3_convert.quantise.grid import Floats, Grid, round_least_squares
from sa3_convert.quantise.sensitivity import local_energy

_FIT: Final = "fit/"
_CHECK: Final = "check/"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Second moments of each linear's inputs: of one set of samples to fit on, of another to check with."""

    path: Path

    @classmethod
    def write(cls, path: Path, fit: Moments, check: Moments) -> "Calibration":
        """Keep moments in a file that is mapped when they are needed."""
        tensors = {_FIT + name: value for name, value in fit.items()}
        save_file(tensors | {_CHECK + name: value for name, value in check.items()}, path)
        return cls(path)

    def of(self, layer: str) -> tuple[NDArray[np.float64], NDArray[np.float32]] | None:
        """Return the moments to fit on and those to check with, or None for a layer that has none."""
        with safe_open(self.path, "numpy") as file:
            if _FIT + layer not in file.keys():  # noqa: SIM118 - safe_open is no mapping
                return None
            return file.get_tensor(_FIT + layer).astype(np.float64), file.get_tensor(_CHECK + layer)


def round_calibrated(weight: Floats, layer: str, grid: Grid, calibration: Calibration) -> Floats:
    """Return the weight on its grid, compensated if that lowers the error on samples that it was not fitted on.

    Elsewhere, and for layers without moments (convolutions), it is rounded by least squares.

    Args:
        weight: [out, in, *kernel] float32.
        layer: its name.
        grid: the grid of the file that will be written.
        calibration: moments of the reference's activations.

    """
    plain = round_least_squares(weight, grid)
    moments = calibration.of(layer) if weight.ndim == 2 else None
    if moments is None:
        return plain
    fit, check = moments
    compensated = round_error_compensated(weight, fit, grid)
    helps = local_energy(compensated - weight, check) < local_energy(plain - weight, check)
    return compensated if helps else plain
