"""SiLU is spelled so that the converter does not recognise it, for MNN 3.0, which has no operator for it.

    x · Sigmoid(x)    →    x · Reciprocal(1 + Exp(−x))

MNN's converter makes one operator of the left side, and MNN 3.0.0 refuses to run it ("Unary Op can not execute",
measured); 3.1 has it. For large negative x the exponential is infinite and the result −0, as it should be.

Nothing is done with a Sigmoid that multiplies something else.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

from sa3_convert.mnn.target import MnnVersion
from sa3_convert.passes import _graph

NEEDED_BEFORE: Final[MnnVersion] = "3.1"
"""Lint and pipeline ask for it below this version."""


def is_silu(product: ir.Node) -> bool:
    """Whether a node is x · Sigmoid(x)."""
    return _sigmoid(product) is not None


def spell_silu(model: ir.Model) -> int:
    """Replace the Sigmoid of each SiLU, in place.

    Returns:
        How many there were.

    """
    graph = model.graph
    taken = _graph.names_in(graph)
    found = [(node, sigmoid) for node in graph if (sigmoid := _sigmoid(node)) is not None]
    one = _graph.add_constant(graph, _graph.unused_name("silu.one", taken), np.array(1, np.float32)) if found else None
    for product, sigmoid in found:
        x = sigmoid.inputs[0]
        steps: list[ir.Node] = []
        value = x
        for operator, others in (("Neg", []), ("Exp", []), ("Add", [one]), ("Reciprocal", [])):
            name = _graph.unused_name(f"{product.outputs[0].name}.{operator.lower()}", taken)
            output = ir.val(name, ir.DataType.FLOAT, sigmoid.outputs[0].shape)
            steps.append(ir.node(operator, [value, *others], outputs=[output], name=name))
            value = output
        graph.insert_before(product, steps)
        for index, used in enumerate(product.inputs):
            if used is sigmoid.outputs[0]:
                product.replace_input_with(index, value)
        _graph.remove_unused(graph, sigmoid.outputs)
    return len(found)


def _sigmoid(product: ir.Node) -> ir.Node | None:
    if product.op_type != "Mul" or product.domain:
        return None
    for x, gate in (product.inputs, reversed(product.inputs)):
        sigmoid = _graph.produced(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return sigmoid
    return None
