"""Weights move onto the grid of least squared error that MNN's converter reproduces exactly.

For each linear and convolution that the recipe quantises:

    W → lo + step·round((W − lo)/step)     (asymmetric; symmetric: lo = 0)

per output channel, or per block of its inputs, with lo and step as `quantise.grid` chooses them. With calibration,
later columns make up for the rounding of earlier ones (`quantise.compensated`) where that is measured to help. Each
weight is rounded when the graph is saved, so no two are in memory at once.

Nothing is done with layers that a rule keeps in floating point, with weights that the converter leaves alone (shared by
more than four MatMuls, three-dimensional, computed), and with recipes that leave the rounding to the converter.
"""

from functools import partial

import onnx_ir as ir

from sa3_convert.errors import ConversionError
from sa3_convert.quantise.grid import Grid, round_least_squares
from sa3_convert.quantise.layers import quantisable_layers
from sa3_convert.quantise.moments import Calibration
from sa3_convert.quantise.rounding import round_calibrated
from sa3_convert.recipe import WeightScheme


def round_weights(model: ir.Model, scheme: WeightScheme, calibration: Calibration | None = None) -> int:
    """Plan the rounding of every weight that the scheme quantises, in place.

    Args:
        model: rewritten in place.
        scheme: bits, blocks and rules.
        calibration: if given, error-compensated rounding is used where it helps; of layers that share a weight, the
            first one's inputs count.

    Returns:
        How many weights will be rounded.

    Raises:
        ConversionError: two layers share a weight, and the scheme's rules give them different grids.

    """
    grids: dict[ir.Value, Grid] = {}
    for layer in quantisable_layers(model):
        bits, block_size = scheme.for_layer(layer.name)
        if bits is None:
            continue
        grid = Grid(bits, scheme.symmetric, block_size, half_scales=scheme.scales == "fp16")
        known = grids.setdefault(layer.weight, grid)
        if known != grid:
            raise ConversionError(
                f"Layer {layer.name!r} shares the weight {layer.weight.name!r} with another one that the recipe's "
                f"rules give other bits or blocks ({known.bits} bits, block {known.block_size}); give both the same."
            )
        if known is grid:
            layer.replace(
                partial(round_least_squares, grid=grid)
                if calibration is None
                else partial(round_calibrated, layer=layer.name, grid=grid, calibration=calibration)
            )
    return len(grids)
