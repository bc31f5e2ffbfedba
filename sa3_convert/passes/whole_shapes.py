"""A part of a shape is cut out of the whole shape.

    Shape<start, end>(x)    →    Slice(Shape(x), start, end)

From 3.5 on MNN's converter writes the range with the operator; MNN before 3.5 refuses the whole file ("Invalidate
buffer"), and on an operator without a range all versions agree. The result is the same integers.

Nothing is done for a Shape without a range; one whose range is everything loses it.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

from sa3_convert.mnn.target import MnnVersion
from sa3_convert.passes import _graph

NEEDED_BEFORE: Final[MnnVersion] = "3.5"
"""Lint and pipeline ask for it below this version."""
_END = np.iinfo(np.int32).max


def has_range(shape: ir.Node) -> bool:
    """Whether a Shape names where to start or end."""
    return not {"start", "end"}.isdisjoint(shape.attributes)


def use_whole_shapes(model: ir.Model) -> int:
    """Replace the ranges of Shape operators, in place.

    Returns:
        How many had one.

    """
    graph = model.graph
    taken = _graph.names_in(graph)
    found = [node for node in graph if node.op_type == "Shape" and not node.domain and has_range(node)]
    for node in found:
        bounds = {"start": _graph.attribute_int(node, "start", 0), "end": _graph.attribute_int(node, "end", _END)}
        for name in bounds:
            node.attributes.pop(name, None)
        if bounds == {"start": 0, "end": _END}:
            continue
        part = node.outputs[0]
        whole = ir.val(_graph.unused_name(f"{part.name}.whole", taken), ir.DataType.INT64)
        limits = [
            _graph.add_constant(graph, _graph.unused_name(f"{part.name}.{name}", taken), np.array([bound], np.int64))
            for name, bound in bounds.items()
        ]
        shape = ir.node("Shape", list(node.inputs), outputs=[whole], name=whole.name)
        cut = ir.val(part.name, part.dtype, part.shape)
        graph.insert_before(node, [shape, ir.node("Slice", [whole, *limits], outputs=[cut], name=node.name)])
        part.replace_all_uses_with(cut, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return len(found)
