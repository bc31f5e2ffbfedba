"""Passes over stored weights: rounded ahead of MNN's converter, or lifted out of small ranges."""

from collections.abc import Set
from functools import partial
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.arrays import Floats
from sa3_convert.errors import ConversionError
from sa3_convert.mnn.layer_rules import LIFTED_SUFFIX
from sa3_convert.passes import ir_tools
from sa3_convert.passes.half import HALF_LARGEST
from sa3_convert.recipe import WeightScheme
from sa3_convert.rounding.grid import Grid, grid_for, round_least_squares
from sa3_convert.rounding.network import Layer, PlannedWeights, quantisable_layers


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


LEAST_STEP: Final = 2.0**-18
"""Four times what is stored: room for what rounding makes of the extremes."""
LEAST_HALF_STEP: Final = 2.0**-14
_MOST: Final = 24
"""2⁻²⁴ is the least power of two that FP16 holds, to which the factors may be halved."""


def lift_small_weights(model: ir.Model, scheme: WeightScheme) -> int:
    """Lift, in place, the channels that need it, when the model is saved; return how many layers have such channels."""
    new = ir_tools.Additions(model.graph)
    lifted: dict[ir.Value, NDArray[np.int64]] = {}
    count = 0
    for layer in quantisable_layers(model):
        grid = grid_for(scheme, layer.name)
        bias = layer.node.inputs[2] if len(layer.node.inputs) > 2 else None
        if grid is None or (bias is not None and ir_tools.constant_tensor(bias) is None):
            continue
        if layer.weight not in lifted:
            exponents = lacking(layer.read(), grid)
            lifted[layer.weight] = exponents
            if exponents.any():
                layer.replace(partial(_times, exponents=exponents))
        if lifted[layer.weight].any():
            _lower(new, layer, bias, lifted[layer.weight])
            count += 1
    return count


def lacking(weight: Floats, grid: Grid) -> NDArray[np.int64]:
    """Return by how many powers of two each output channel of [out, in, *kernel] must be lifted; shape [out]."""
    rows = weight.reshape(weight.shape[0], -1, grid.group_length(weight.shape))
    largest = np.abs(rows).max(axis=2).astype(np.float64)
    extent = largest if grid.symmetric else rows.max(axis=2).astype(np.float64) - rows.min(axis=2)
    least = LEAST_HALF_STEP if grid.half_scales else LEAST_STEP
    whole = least * grid.top
    with np.errstate(divide="ignore"):
        by_step = np.log2(whole / extent)
        # Numbers this large keep b bits even when all of them get one code.
        by_size = np.log2(whole * 2.0**grid.bits / largest)
        # What is stored of a channel's largest block, a minimum or a step, must not become infinite.
        room = np.floor(np.log2(HALF_LARGEST * (grid.top if grid.symmetric else 1) / largest.max(axis=1)))
    wanted = np.ceil(np.minimum(by_step, by_size))
    wanted = np.where((extent == 0) | (largest == 0), 0, wanted).max(axis=1)
    most = np.clip(room, 0, _MOST) if grid.half_scales else _MOST
    exponents: NDArray[np.int64] = np.clip(wanted, 0, most).astype(np.int64)
    return exponents


def _times(weight: Floats, exponents: NDArray[np.int64]) -> Floats:
    return np.ldexp(weight, exponents.reshape(-1, *(1,) * (weight.ndim - 1))).astype(np.float32)


def _lower(new: ir_tools.Additions, layer: Layer, bias: ir.Value | None, exponents: NDArray[np.int64]) -> None:
    if bias is not None:
        values = np.ldexp(ir_tools.array(bias).astype(np.float32), exponents)
        layer.node.replace_input_with(2, new.constant(f"{bias.name}{LIFTED_SUFFIX}", values.astype(np.float32)))
    behind = (1,) * (len(layer.shape) - 2)
    factors = np.ldexp(np.float32(1), -exponents).astype(np.float32).reshape(-1, *behind)
    high = layer.node.outputs[0]
    low = ir.val(high.name, high.dtype, high.shape)
    high.name = new.name(f"{high.name}{LIFTED_SUFFIX}")
    high.replace_all_uses_with(low, replace_graph_outputs=True)
    constant = new.constant(f"{low.name}.lowering", factors)
    new.graph.insert_after(layer.node, ir.node("Mul", [high, constant], outputs=[low], name=f"{low.name}.lowered"))
