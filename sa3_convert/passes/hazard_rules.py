"""What a row of the hazard table is, and how each kind is recognised at a node; the rows are in `hazards`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from sa3_convert.mnn.compatibility import MnnVersion, is_older
from sa3_convert.passes import ir_tools, softmax, spellings


@dataclass(frozen=True)
class Facts:
    """What a rule may ask of the graph around a node."""

    target_mnn: MnnVersion
    run_time: frozenset[ir.Value]
    """Values that depend on a graph input in any way, its shape included."""
    run_time_data: frozenset[ir.Value]
    """Values that depend on a graph input's content: what follows from shapes alone is computed on the host."""
    local_functions: frozenset[tuple[str, str]]
    opset: int
    """Version of ONNX's own operators."""


Severity = Literal["wrong", "unsupported", "cuda", "tool", "info"]
"""wrong: other numbers on the CPU without an error. unsupported: no file, or none that the
target can run. cuda: wrong on CUDA. tool: the converter or the Python bindings do something else than they were asked.
info: worth knowing."""


@dataclass(frozen=True)
class HazardKind:
    """One row of the table."""

    id: str
    happens: str
    fix: str
    """What to write or ask for instead."""
    avoided: str
    """What this project does about it, and where."""
    found: "Rule | None" = None
    """Recognises it at a node; None where no graph shows it."""
    severity: Severity = field(kw_only=True)
    mnn: str = field(kw_only=True)
    """Where it was seen: versions, back-end and processor."""


CPU = "3.6.1, CPU of x86-64, measured"
"""Where most were seen."""


INTEGER = frozenset(kind for kind in ir.DataType if kind.is_integer()) | {ir.DataType.BOOL}
_INT32 = np.iinfo(np.int32)


Rule = Callable[[ir.Node, Facts], bool]


def on(operators: str, rule: Rule) -> Rule:
    """Return a rule that is asked of some operators only."""
    names = frozenset(operators.split())
    return lambda node, facts: node.op_type in names and rule(node, facts)


def operator(*names: str) -> Rule:
    """Return a rule that finds operators by their names."""
    return lambda node, facts: node.op_type in names and not node.domain


def where_reads_else_out_of_bounds(node: ir.Node, facts: Facts) -> bool:
    """Whether the second branch of a Where must be broadcast."""
    # The converter broadcasts the branches only when the first one needs it.
    out, then, other = (None if v is None else v.shape for v in (node.outputs[0], node.inputs[1], node.inputs[2]))
    if other is not None and all(size == 1 for size in other):
        return False
    return not (_surely_smaller(then, out) or _surely_equal(other, out))


def _aligned(shape: Sequence[object], out: Sequence[object]) -> list[object]:
    return [1] * (len(out) - len(shape)) + list(shape)


def _surely_equal(shape: ir.Shape | None, out: ir.Shape | None) -> bool:
    if shape is None or out is None or any(isinstance(size, ir.SymbolicDim) and size.value is None for size in shape):
        return False
    return list(shape) == list(out)


def _surely_smaller(shape: ir.Shape | None, out: ir.Shape | None) -> bool:
    if shape is None or out is None:
        return False
    pairs = zip(_aligned(list(shape), list(out)), out, strict=True)
    return any(own == 1 and isinstance(whole, int) and whole != 1 for own, whole in pairs)


def reduces_over_everything(node: ir.Node, facts: Facts) -> bool:
    """Whether a reduction gets its axes as an input and they are not all axes, or leaves them or keepdims out."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return "keepdims" not in node.attributes or (facts.opset >= 18 and node.attributes["keepdims"].as_int() != 0)
    axes = ir_tools.constant_tensor(node.inputs[1])
    data = node.inputs[0]
    if axes is None or data is None or data.shape is None:
        return True
    return len({int(axis) % len(data.shape) for axis in axes.numpy().reshape(-1)}) not in (0, len(data.shape))


def resizes_one_dimension(node: ir.Node, facts: Facts) -> bool:
    """Whether a Resize interpolates along one dimension."""
    data = node.inputs[0]
    one_dimension = data is None or data.shape is None or len(data.shape) == 3
    # Without a mode ONNX takes the nearest sample; MNN's converter does not.
    return one_dimension and node.attributes.get_string("mode", "linear") == "linear"


def clamps_a_constant(node: ir.Node, facts: Facts) -> bool:
    """Whether an int64 constant does not fit 32 bits."""
    for index, value in enumerate(node.inputs):
        tensor = ir_tools.constant_tensor(value)
        if tensor is None or tensor.dtype != ir.DataType.INT64 or not tensor.size:
            continue
        # To Slice a limit beyond the end means the end, clamped or not.
        if node.op_type == "Slice" and index in (1, 2):
            continue
        numbers = tensor.numpy()
        if numbers.max() > _INT32.max or numbers.min() < _INT32.min:
            return True
    return False


def dequantises_what_mnn_does_not_expect(node: ir.Node, facts: Facts) -> bool:
    """Whether a DequantizeLinear is not one of a constant along a later axis."""
    data, scale = (ir_tools.constant_tensor(value) for value in node.inputs[:2])
    if data is None:
        return True
    per_axis = scale is None or scale.size != 1
    return per_axis and ir_tools.attribute_int(node, "axis", 1) % max(len(data.shape), 1) == 0


def reads_half_from_a_file(node: ir.Node, facts: Facts) -> bool:
    """Whether a float16 constant lies in external data."""
    tensors = (ir_tools.constant_tensor(value) for value in node.inputs)
    return any(isinstance(t, ir.ExternalTensor) and t.dtype == ir.DataType.FLOAT16 for t in tensors)


def has_integer_data(node: ir.Node, facts: Facts) -> bool:
    """Whether an operator works on integers or booleans that depend on the inputs."""
    data = [value for value in node.inputs if value is not None and value in facts.run_time_data]
    return any(value.dtype in INTEGER for value in data)


def gathers_from_the_end(node: ir.Node, facts: Facts) -> bool:
    """Whether constant indices count from the end."""
    indices = ir_tools.constant_tensor(node.inputs[1])
    return indices is not None and indices.size > 0 and bool((indices.numpy() < 0).any())


def softmax_without_maximum(node: ir.Node, facts: Facts) -> bool:
    """Whether rows of a Softmax may be too low for the target."""
    return is_older(facts.target_mnn, softmax.NEEDED_BEFORE) and softmax.needs_shift(node)


def shape_with_range(node: ir.Node, facts: Facts) -> bool:
    """Whether a Shape has a range that the target does not know."""
    return is_older(facts.target_mnn, spellings.WHOLE_SHAPES_NEEDED_BEFORE) and spellings.has_range(node)


def silu(node: ir.Node, facts: Facts) -> bool:
    """Whether the converter would make a SiLU that the target does not know."""
    return is_older(facts.target_mnn, spellings.SILU_NEEDED_BEFORE) and spellings.is_silu(node)


def weight_is_a_norm(node: ir.Node, facts: Facts) -> bool:
    """Whether a weight is computed with a norm."""
    if len(node.inputs) < 2 or node.inputs[1] in facts.run_time:
        return False
    pending = [node.inputs[1]]
    while pending:
        value = pending.pop()
        producer = None if value is None else value.producer()
        if producer is not None:
            if producer.op_type.startswith("Reduce"):
                return True
            pending.extend(producer.inputs)
    return False


def truncated_modulo(node: ir.Node, facts: Facts) -> bool:
    """Whether a Mod takes the dividend's sign, or is of floats."""
    dividend = node.inputs[0]
    return dividend is None or dividend.dtype not in INTEGER or ir_tools.attribute_int(node, "fmod", 0) == 1


def calls_a_function(node: ir.Node, facts: Facts) -> bool:
    """Whether a node calls a function of the model's own."""
    return (node.domain, node.op_type) in facts.local_functions
