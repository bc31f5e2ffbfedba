"""The row maximum is subtracted before a Softmax, for MNN builds whose CUDA Softmax needs it.

    Softmax(x)  →  Softmax(x − max(x))

Softmax does not change when a row is shifted, and the usual implementation shifts by the same maximum, so the result is
the same, bit for bit, where Softmax was right. Up to MNN 3.5.0 the CUDA kernel starts idle lanes at 0, so on axes of
more than 32 it shifts rows of negative numbers by 0, and exp(x) underflows in rows whose maximum is far below (the
published "echo").

Nothing is done when no row can be that low (see `row_maxima`), when the maximum is subtracted already, or when the type
is not float32.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

from sa3_convert.mnn.target import MnnVersion
from sa3_convert.passes import _graph
from sa3_convert.passes.row_maxima import lowest_row_maximum

NEEDED_BEFORE: Final[MnnVersion] = "3.6"
"""Lint and pipeline ask for it below this version."""
LOWEST_SAFE = -64.0
"""exp(−64) is 2·10⁻²⁸: what lies up to 23 below such a maximum, a weight of 10⁻¹⁰, is still a normal float32."""


def needs_shift(softmax: ir.Node) -> bool:
    """Whether a row of a Softmax's input may be so low that MNN before 3.6 gets it wrong on CUDA."""
    logits = softmax.inputs[0]
    if logits is None:
        return True
    if _graph.is_shifted_by_its_maximum(logits):
        return False
    # Zero times no bound is NaN, which is no bound either.
    return not lowest_row_maximum(softmax) >= LOWEST_SAFE


def subtract_row_maximum(model: ir.Model) -> int:
    """Shift the input of each Softmax that needs it, in place.

    Returns:
        How many were shifted.

    """
    graph = model.graph
    taken = _graph.names_in(graph)
    count = 0
    for node in list(graph):
        if node.op_type not in ("Softmax", "LogSoftmax") or node.domain:
            continue
        logits = node.inputs[0]
        if logits is None or logits.dtype != ir.DataType.FLOAT or not needs_shift(node):
            continue
        axis = np.array([_graph.attribute_int(node, "axis", -1)], np.int64)
        axes = _graph.add_constant(graph, _graph.unused_name(f"{logits.name}.axes", taken), axis)
        maximum = ir.val(_graph.unused_name(f"{logits.name}.maximum", taken), ir.DataType.FLOAT)
        shifted = ir.val(_graph.unused_name(f"{logits.name}.shifted", taken), ir.DataType.FLOAT, logits.shape)
        reduce = ir.node("ReduceMax", [logits, axes], {"keepdims": 1}, outputs=[maximum], name=maximum.name)
        subtract = ir.node("Sub", [logits, maximum], outputs=[shifted], name=shifted.name)
        graph.insert_before(node, [reduce, subtract])
        node.replace_input_with(0, shifted)
        count += 1
    return count
