"""SiLU and shapes spelled as older versions of MNN take them."""

from typing import Final

import numpy as np
import onnx_ir as ir

from sa3_convert.mnn.compatibility import MnnVersion
from sa3_convert.passes import ir_tools

SILU_NEEDED_BEFORE: Final[MnnVersion] = "3.1"
"""Lint and pipeline ask for it below this version."""


def is_silu(product: ir.Node) -> bool:
    """Whether a node is x · Sigmoid(x)."""
    return _sigmoid(product) is not None


def spell_silu(model: ir.Model) -> int:
    """Replace the Sigmoid of each SiLU, in place; return how many."""
    graph = model.graph
    new = ir_tools.Additions(graph)
    found = [(node, sigmoid) for node in graph if (sigmoid := _sigmoid(node)) is not None]
    one = new.constant("silu.one", np.float32(1)) if found else None
    for product, sigmoid in found:
        value = sigmoid.inputs[0]
        for operator, others in (("Neg", []), ("Exp", []), ("Add", [one]), ("Reciprocal", [])):
            name = f"{product.outputs[0].name}.{operator.lower()}"
            value = new.node(operator, [value, *others], name, shape=sigmoid.outputs[0].shape)
        new.insert_before(product)
        for index, used in enumerate(product.inputs):
            if used is sigmoid.outputs[0]:
                product.replace_input_with(index, value)
        ir_tools.remove_unused(graph, sigmoid.outputs)
    return len(found)


def _sigmoid(product: ir.Node) -> ir.Node | None:
    if product.op_type != "Mul" or product.domain:
        return None
    for x, gate in ir_tools.either_order(product):
        sigmoid = ir_tools.produced(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return sigmoid
    return None


WHOLE_SHAPES_NEEDED_BEFORE: Final[MnnVersion] = "3.5"
"""Lint and pipeline ask for it below this version."""
_END = np.iinfo(np.int32).max


def has_range(shape: ir.Node) -> bool:
    """Whether a Shape names where to start or end."""
    return not {"start", "end"}.isdisjoint(shape.attributes)


def use_whole_shapes(model: ir.Model) -> int:
    """Replace the ranges of Shape operators, in place; return how many had one."""
    graph = model.graph
    new = ir_tools.Additions(graph)
    found = [node for node in graph if node.op_type == "Shape" and not node.domain and has_range(node)]
    for node in found:
        bounds = {"start": ir_tools.attribute_int(node, "start", 0), "end": ir_tools.attribute_int(node, "end", _END)}
        for name in bounds:
            node.attributes.pop(name, None)
        if bounds == {"start": 0, "end": _END}:
            continue
        part = node.outputs[0]
        whole = new.node("Shape", node.inputs, f"{part.name}.whole", ir.DataType.INT64)
        limits = [new.constant(f"{part.name}.{name}", np.array([bound], np.int64)) for name, bound in bounds.items()]
        cut = ir.val(part.name, part.dtype, part.shape)
        new.nodes.append(ir.node("Slice", [whole, *limits], outputs=[cut], name=node.name))
        new.insert_before(node)
        part.replace_all_uses_with(cut, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return len(found)
