"""The row maximum is subtracted before a Softmax, for MNN builds whose CUDA Softmax needs it.

    Softmax(x)  →  Softmax(x − max(x))

Softmax does not change when a row is shifted, and the usual implementation shifts by the same maximum, so the result is
the same, bit for bit, where Softmax was right. Up to MNN 3.5.0 the CUDA kernel starts idle lanes at 0: rows whose
maximum is below about −70 come out wrong on axes longer than 32 (the published "echo").

Nothing is done when the maximum is subtracted already, or when the type is not float32.
"""

import numpy as np
import onnx_ir as ir

from sa3_convert.passes import _graph


def subtract_row_maximum(model: ir.Model) -> int:
    """Shift the input of each Softmax, in place.

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
        if logits is None or logits.dtype != ir.DataType.FLOAT or _graph.is_shifted_by_its_maximum(logits):
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
