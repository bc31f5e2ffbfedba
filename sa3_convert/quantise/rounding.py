"""Rounding with what calibration knows of a layer's inputs, where that is measured to help."""

from sa3_convert.quantise.compensated import round_error_compensated
from sa3_convert.quantise.grid import Floats, Grid, round_least_squares
from sa3_convert.quantise.moments import Calibration, local_energy


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
