"""Output channels whose weights are too small for MNN's scales are lifted by powers of two, then lowered.

    y_o = Σ x·W_o + b_o   →   y_o = 2^(−k_o) · (Σ x·(W_o·2^k_o) + b_o·2^k_o)

MNN 3.6.1 does not store a step below about 10⁻⁶: symmetric weights of such a channel become 0, asymmetric ones are off
by more than they are (−4 to −12 dB). A channel of b bits is safe when its largest magnitude is above 10⁻⁶·(2^(b−1)−1),
or the range of each of its blocks above 10⁻⁶·(2^b−1): 1.3·10⁻⁴ with 8 bits, 7·10⁻⁶ with 4. Measured for 2, 3, 4, 6
and 8 bits, symmetric or not, with and without blocks. Steps that are stored as FP16 lose digits below 2⁻¹⁴, so that is
their limit. As factors are powers of two, every float32 result is the same bit for bit (as long as none is denormal).

Nothing is done with channels of zeros, with numbers so close to each other that the step does not matter beside them,
and where a layer's bias is computed. More than 2²⁴ is not made up for; what is that small has no part in the output.
"""

from functools import partial
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.mnn.layer_rules import LIFTED_SUFFIX
from sa3_convert.passes import _graph
from sa3_convert.quantise.grid import Floats, Grid, grid_for
from sa3_convert.quantise.layers import Layer, quantisable_layers
from sa3_convert.recipe import WeightScheme

LEAST_STEP: Final = 2.0**-18
"""Four times what is stored: room for what rounding makes of the extremes."""
LEAST_HALF_STEP: Final = 2.0**-14
_MOST: Final = 24
"""2⁻²⁴ is the least power of two that FP16 holds, to which the factors may be halved."""


def lift_small_weights(model: ir.Model, scheme: WeightScheme) -> int:
    """Lift, in place, the channels that need it; weights are read here, and multiplied when the model is saved.

    Returns:
        How many layers have such channels.

    """
    taken = _graph.names_in(model.graph)
    lifted: dict[ir.Value, NDArray[np.int64]] = {}
    count = 0
    for layer in quantisable_layers(model):
        grid = grid_for(scheme, layer.name)
        bias = layer.node.inputs[2] if len(layer.node.inputs) > 2 else None
        if grid is None or (bias is not None and _graph.constant_tensor(bias) is None):
            continue
        if layer.weight not in lifted:
            exponents = lacking(layer.read(), grid)
            lifted[layer.weight] = exponents
            if exponents.any():
                layer.replace(partial(_times, exponents=exponents))
        if lifted[layer.weight].any():
            _lower(model.graph, layer, bias, lifted[layer.weight], taken)
            count += 1
    return count


def lacking(weight: Floats, grid: Grid) -> NDArray[np.int64]:
    """Return by how many powers of two each output channel must be lifted; shape [out].

    Args:
        weight: [out, in, *kernel].
        grid: how it will be stored.

    """
    rows = weight.reshape(weight.shape[0], -1, grid.group_length(weight.shape))
    largest = np.abs(rows).max(axis=2).astype(np.float64)
    extent = largest if grid.symmetric else rows.max(axis=2).astype(np.float64) - rows.min(axis=2)
    least = LEAST_HALF_STEP if grid.half_scales else LEAST_STEP
    whole = least * grid.top
    with np.errstate(divide="ignore"):
        by_step = np.log2(whole / extent)
        # Numbers this large keep b bits even when all of them get one code.
        by_size = np.log2(whole * 2.0**grid.bits / largest)
    wanted = np.ceil(np.minimum(by_step, by_size))
    wanted = np.where((extent == 0) | (largest == 0), 0, np.clip(wanted, 0, _MOST))
    exponents: NDArray[np.int64] = wanted.max(axis=1).astype(np.int64)
    return exponents


def _times(weight: Floats, exponents: NDArray[np.int64]) -> Floats:
    return np.ldexp(weight, exponents.reshape(-1, *(1,) * (weight.ndim - 1))).astype(np.float32)


def _lower(graph: ir.Graph, layer: Layer, bias: ir.Value | None, exponents: NDArray[np.int64], taken: set[str]) -> None:
    if bias is not None:
        values = np.ldexp(_graph.array(bias).astype(np.float32), exponents)
        name = _graph.unused_name(f"{bias.name}{LIFTED_SUFFIX}", taken)
        layer.node.replace_input_with(2, _graph.add_constant(graph, name, values.astype(np.float32)))
    behind = (1,) * (len(layer.shape) - 2)
    factors = np.ldexp(np.float32(1), -exponents).astype(np.float32).reshape(-1, *behind)
    high = layer.node.outputs[0]
    low = ir.val(high.name, high.dtype, high.shape)
    high.name = _graph.unused_name(f"{high.name}{LIFTED_SUFFIX}", taken)
    high.replace_all_uses_with(low, replace_graph_outputs=True)
    constant = _graph.add_constant(graph, _graph.unused_name(f"{low.name}.lowering", taken), factors)
    graph.insert_after(layer.node, ir.node("Mul", [high, constant], outputs=[low], name=f"{low.name}.lowered"))
