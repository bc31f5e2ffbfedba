"""Weights move onto the grid of least squared error that MNN's converter reproduces exactly.

For each linear and convolution that the recipe quantises:

    W → lo + step·round((W − lo)/step)     (asymmetric; symmetric: lo = 0)

per output channel, or per block of its inputs, with lo and step as `quantise.grid` chooses them. Each weight is rounded
when the graph is saved, so no two are in memory at once.

Layers whose rounding was planned ahead (`quantise.network`) take the weight that the plan holds before any other pass,
so that what later passes do to a weight is done to this one; powers of two, which is all they do, keep it on its grid.

Nothing is done with layers that a rule keeps in floating point, with weights that the converter leaves alone (shared by
more than four MatMuls, three-dimensional, computed), and with recipes that leave the rounding to the converter.
"""

from collections.abc import Set
from functools import partial

import onnx_ir as ir

from sa3_convert.errors import ConversionError
from sa3_convert.quantise.grid import Floats, Grid, grid_for, round_least_squares
from sa3_convert.quantise.layers import quantisable_layers
from sa3_convert.quantise.planned import PlannedWeights
from sa3_convert.recipe import WeightScheme


def take_planned(model: ir.Model, planned: PlannedWeights) -> int:
    """Put planned weights in the place of the layers' own, in place; they are read when they are used.

    Returns:
        How many layers took theirs.

    Raises:
        ConversionError: the plan cannot be read, or holds none of the graph's layers (a part of a component has some).

    """
    names = planned.names()
    layers = [layer for layer in quantisable_layers(model) if layer.name in names]
    if not layers:
        raise ConversionError(
            f"{planned.path} holds weights for {min(names, default='no layer')!r}, not for this graph."
        )
    for layer in layers:
        layer.replace(partial(_planned, name=layer.name, planned=planned))
    return len(layers)


def weights_of(model: ir.Model, names: Set[str]) -> frozenset[str]:
    """Return the names of the initialisers that hold the weights of these layers."""
    return frozenset(str(layer.weight.name) for layer in quantisable_layers(model) if layer.name in names)


def _planned(_: Floats, name: str, planned: PlannedWeights) -> Floats:
    return planned.read(name)


def round_weights(model: ir.Model, scheme: WeightScheme, finished: Set[str] = frozenset()) -> int:
    """Plan the rounding of every weight that the scheme quantises, in place.

    Args:
        model: rewritten in place.
        scheme: bits, blocks and rules.
        finished: layers whose weights are on their grid already.

    Returns:
        How many weights are quantised.

    Raises:
        ConversionError: two layers share a weight, and the scheme's rules give them different grids.

    """
    grids: dict[ir.Value, Grid] = {}
    for layer in quantisable_layers(model):
        grid = grid_for(scheme, layer.name)
        if grid is None:
            continue
        known = grids.setdefault(layer.weight, grid)
        if known != grid:
            raise ConversionError(
                f"Layer {layer.name!r} shares the weight {layer.weight.name!r} with another one that the recipe's "
                f"rules give other bits or blocks ({known.bits} bits, block {known.block_size}); give both the same."
            )
        if known is grid and layer.name not in finished:
            layer.replace(partial(round_least_squares, grid=grid))
    return len(grids)
