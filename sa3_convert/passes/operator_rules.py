"""How forms of operators are recognised that MNN gets wrong; what they mean is in `operator_kinds`.

A form that depends on what the graph does not say (an unknown rank, indices that are computed) counts as the wrong one.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable

import onnx_ir as ir

from sa3_convert.passes import ir_tools
from sa3_convert.passes.hazard_rules import INTEGER, Facts, Rule, on

_RIGHT = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil
    Celu Clip Concat Constant Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear
    Div Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual HardSigmoid HardSwish Identity InstanceNormalization
    LayerNormalization LeakyRelu LessOrEqual Log LogSoftmax LRN MatMul Max MaxPool Mean Min Mul Neg Not Or Pad
    Pow PRelu Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ScatterElements ScatterND Selu Shape Sigmoid Sign
    Sin Sinh Size Slice Softmax Softsign Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose
    Trilu Unsqueeze Where Xor
"""
COMPUTED_RIGHT = frozenset(_RIGHT.split())
"""Operators that came out right in ONNX's node tests and over wide ranges, but for the forms that have rows of their
own."""
_NAMED = "Attention GroupNormalization IsInf IsNaN Less Mish Mod RMSNormalization RotaryEmbedding Round Softplus"
NAMED = frozenset(_NAMED.split())
"""Operators that have rows of their own whatever their form."""

OLDEST_OPSET = 7
"""Before, `axis` and `broadcast` said how operands were broadcast; ONNX Runtime promises nothing for it either."""

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})
_WIDE = _FLOATS | {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL}
_LENGTH = re.compile(r"(?:(\d+) ?\* ?)?[A-Za-z_]\w*(?: ?\+ ?(\d+))?")
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
BINARY = "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or Pow Sub Sum Xor"
_CHANNELS = """
    AveragePool BatchNormalization Conv ConvTranspose DepthToSpace GlobalAveragePool GlobalMaxPool
    InstanceNormalization LRN MaxPool PRelu Resize
"""
_OVER_CHANNELS = frozenset(_CHANNELS.split())
"""Operators whose results MNN stores with channels in fours, as it does what is computed from them."""


def not_shown_right(node: ir.Node, facts: Facts) -> bool:
    """Whether an operator is none that was shown to be computed right, or of an opset with other ways to broadcast."""
    if (node.domain, node.op_type) in facts.local_functions:
        return False
    return (
        facts.opset < OLDEST_OPSET or node.domain not in ("", "ai.onnx") or node.op_type not in COMPUTED_RIGHT | NAMED
    )


def has(operators: str, attribute: str, wanted: Callable[[object], bool] = lambda _: True) -> Rule:
    """Return a rule that finds operators with an attribute whose value is as wanted."""

    def found(node: ir.Node, facts: Facts) -> bool:
        own = node.attributes.get(attribute)
        return own is not None and wanted(own.value)

    return on(operators, found)


def lacks(operators: str, attribute: str) -> Rule:
    """Return a rule that finds operators without an attribute."""
    return on(operators, lambda node, facts: attribute not in node.attributes)


def compares_two_broadcasts(node: ir.Node, facts: Facts) -> bool:
    """Whether both sides of a comparison may have to be broadcast."""
    sides = [None if value is None else value.shape for value in node.inputs]
    if any(side is not None and all(size == 1 for size in side) for side in sides):
        return False
    out = node.outputs[0].shape
    return out is None or not any(side is not None and list(side) == list(out) for side in sides)


def one_element_first(node: ir.Node, facts: Facts) -> bool:
    """Whether the first operand is a constant of one element and full rank, and the second comes from channels."""
    first, *others = node.inputs
    if first is None or first in facts.run_time or not others or first.shape is None or len(first.shape) < 2:
        return False
    ranks = [0 if value is None or value.shape is None else len(value.shape) for value in others]
    return all(size == 1 for size in first.shape) and len(first.shape) >= max(ranks) and _is_over_channels(others)


def _is_over_channels(values: Iterable[ir.Value | None]) -> bool:
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        producer = None if value is None else value.producer()
        if producer is None or producer in seen:
            continue
        if producer.op_type in _OVER_CHANNELS:
            return True
        seen.add(producer)
        pending.extend(producer.inputs)
    return False


def compares_no_integers(node: ir.Node, facts: Facts) -> bool:
    """Whether numbers that are no integers are compared by Less."""
    return node.inputs[0] is None or node.inputs[0].dtype not in INTEGER


def broadcasts_several(node: ir.Node, facts: Facts) -> bool:
    """Whether an operator of any number of inputs has one, or several of different shapes."""
    shapes = [None if value is None else value.shape for value in node.inputs]
    if len(shapes) == 2 and node.op_type != "Mean":
        return False
    return len(shapes) == 1 or None in shapes or any(shape != shapes[0] for shape in shapes)


def reduces_without_axes(node: ir.Node, facts: Facts) -> bool:
    """Whether a reduction's axes are empty, or computed, or nothing is to be reduced when there are none."""
    if not node.op_type.startswith("Reduce"):
        return False
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if value is None:
        given = "axes" in node.attributes
        return not given and ir_tools.attribute_int(node, "noop_with_empty_axes", 0) != 0
    axes = ir_tools.constant_tensor(value)
    return axes is None or axes.size == 0


def takes_integers(node: ir.Node, facts: Facts) -> bool:
    """Whether the first input holds integers."""
    return _dtype(node) in INTEGER


def product_with_vector(node: ir.Node, facts: Facts) -> bool:
    """Whether the right factor of a MatMul is a vector."""
    return _rank(node, 1) in (1, None)


def pads_below(node: ir.Node, facts: Facts) -> bool:
    """Whether what `auto_pad` adds goes in front when it is odd."""
    return node.attributes.get_string("auto_pad", "NOTSET") == "SAME_LOWER"


def convolution_at_the_end(node: ir.Node, facts: Facts) -> bool:
    """Whether a graph output is what a one-dimensional convolution made, an activation that it takes in included."""
    if not any(value.is_graph_output() for value in node.outputs):
        return False
    while node.op_type in ("Clip", "LeakyRelu", "Relu"):
        producer = None if node.inputs[0] is None else node.inputs[0].producer()
        if producer is None:
            return False
        node = producer
    return node.op_type in _CONVOLUTIONS and _rank(node, 0) in (3, None)


def unusual_pool(node: ir.Node, facts: Facts) -> bool:
    """Whether a pool has no strides, has dilations, rounds up, tells positions, or has three dimensions."""
    dilations = node.attributes.get_ints("dilations", [1])
    return (
        "strides" not in node.attributes
        or any(step != 1 for step in dilations)
        or ir_tools.attribute_int(node, "ceil_mode", 0) != 0
        or len(node.outputs) > 1
        or _rank(node, 0) not in (3, 4)
    )


def unusual_einsum(node: ir.Node, facts: Facts) -> bool:
    """Whether an equation repeats an index in one term, has not one or two terms, dots, or no index left."""
    equation = str(node.attributes.get_string("equation", "")).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    repeated = any(max(Counter(term).values(), default=0) > 1 for term in terms.split(","))
    return repeated or terms.count(",") > 1 or "." in equation or not (arrow and result)


def uneven_split(node: ir.Node, facts: Facts) -> bool:
    """Whether an axis may not be divisible by the number of parts, or a part may be empty."""
    if "num_outputs" in node.attributes:
        shape = None if node.inputs[0] is None else node.inputs[0].shape
        size = None if shape is None else shape[ir_tools.attribute_int(node, "axis", 0)]
        return not isinstance(size, int) or size % ir_tools.attribute_int(node, "num_outputs", 1) != 0
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return 0 in node.attributes.get_ints("split", [])
    sizes = ir_tools.constant_tensor(node.inputs[1])
    return sizes is None or bool((sizes.numpy() == 0).any())


def starts_before_the_axis(node: ir.Node, facts: Facts) -> bool:
    """Whether a slice of an axis of unknown length counts its start from the end."""
    if len(node.inputs) < 3:
        return False
    starts = ir_tools.constant_tensor(node.inputs[1])
    if starts is None or not (starts.numpy() < 0).any():
        return False
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    axes = ir_tools.constant_tensor(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    steps = ir_tools.constant_tensor(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    for index, start in enumerate(starts.numpy().reshape(-1).tolist()):
        axis = index if axes is None else int(axes.numpy().reshape(-1)[index])
        size = None if shape is None else shape[axis]
        backwards = steps is not None and int(steps.numpy().reshape(-1)[index]) < 0
        if start < 0 and not (backwards and start == -1) and -start > _least(size):
            return True
    return False


def _least(size: object) -> int:
    """Return the smallest number that a dimension can be: 17 for "17*T"."""
    if isinstance(size, int):
        return size
    parts = _LENGTH.fullmatch("" if size is None else str(getattr(size, "value", size) or ""))
    return 0 if parts is None else int(parts[1] or 1) + int(parts[2] or 0)


def indices_may_be_negative(node: ir.Node, facts: Facts) -> bool:
    """Whether elements are looked up by indices that are not known to count from the front."""
    indices = ir_tools.constant_tensor(node.inputs[1])
    return indices is None or bool((indices.numpy() < 0).any())


def casts_to_less(node: ir.Node, facts: Facts) -> bool:
    """Whether a cast keeps less than float32 and int32 do."""
    if node.op_type == "Cast":
        target: ir.DataType | None = ir.DataType(ir_tools.attribute_int(node, "to", ir.DataType.FLOAT.value))
    else:
        target = None if node.inputs[1] is None else node.inputs[1].dtype
    return target != _dtype(node) and target not in _WIDE - {ir.DataType.BOOL, ir.DataType.FLOAT16}


def narrow_type(node: ir.Node, facts: Facts) -> bool:
    """Whether numbers of a type that MNN does not compute with are made, but by looking them up in a constant."""
    if node.op_type == "Gather" and ir_tools.constant_tensor(node.inputs[0]) is not None:
        return False
    if node.op_type in ("Cast", "CastLike", "Constant", "DequantizeLinear"):
        return False
    values = [*node.inputs, *node.outputs]
    return any(value is not None and value.dtype is not None and value.dtype not in _WIDE for value in values)


def softmax_of_rows(node: ir.Node, facts: Facts) -> bool:
    """Whether a Softmax is of an opset that flattens, over another axis than the last, or has no axis to go by."""
    if node.op_type == "LogSoftmax" and "axis" not in node.attributes:
        return True
    rank = _rank(node, 0)
    axis = ir_tools.attribute_int(node, "axis", 1 if facts.opset < 13 else -1)
    return facts.opset < 13 and (rank is None or axis % rank != rank - 1 or "axis" not in node.attributes)


def slope_of_later_axis(node: ir.Node, facts: Facts) -> bool:
    """Whether the slopes of a PRelu are not one, or one per channel."""
    rank, slope = _rank(node, 0), node.inputs[1]
    if rank is None or slope is None or slope.shape is None:
        return True
    shape = [1] * (rank - len(slope.shape)) + list(slope.shape)
    return any(size != 1 for axis, size in enumerate(shape) if axis != 1)


def unusual_resize(node: ir.Node, facts: Facts) -> bool:
    """Whether a Resize is none of the forms that were shown to be right."""
    word = node.attributes.get_string
    plain = (
        not ir_tools.attribute_int(node, "antialias", 0)
        and not ir_tools.attribute_int(node, "exclude_outside", 0)
        and "axes" not in node.attributes
        and word("keep_aspect_ratio_policy", "stretch") == "stretch"
        and word("coordinate_transformation_mode", "half_pixel") in ("asymmetric", "half_pixel", "pytorch_half_pixel")
    )
    mode = word("mode", "nearest")
    nearest = mode == "nearest" and word("nearest_mode", "round_prefer_floor") in ("floor", "round_prefer_floor")
    return facts.opset < 11 or not plain or not (nearest or mode == "linear")


def limits_are_inverted(node: ir.Node, facts: Facts) -> bool:
    """Whether a Clip's lower limit lies above its upper one."""
    if len(node.inputs) < 3:
        return False
    low, high = ir_tools.scalar(node.inputs[1]), ir_tools.scalar(node.inputs[2])
    return low is not None and high is not None and low > high


def pads_some_axes(node: ir.Node, facts: Facts) -> bool:
    """Whether a Pad names the axes that it pads."""
    return len(node.inputs) > 3 and node.inputs[3] is not None


def batch_norm_of_computed(node: ir.Node, facts: Facts) -> bool:
    """Whether scale, bias, mean or variance of a batch norm are no constants."""
    return any(ir_tools.constant_tensor(value) is None for value in node.inputs[1:5])


def _dtype(node: ir.Node) -> ir.DataType | None:
    return None if not node.inputs or node.inputs[0] is None else node.inputs[0].dtype


def _rank(node: ir.Node, index: int) -> int | None:
    value = node.inputs[index]
    return None if value is None or value.shape is None else len(value.shape)
