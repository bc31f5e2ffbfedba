"""What MNN is known to get wrong or not to support, as data: how to recognise it, what happens, what to write instead.

CPU rows were measured with MNN 3.6.1 on x86-64 and are measured again by the tests; CUDA rows come from its source.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from sa3_convert.passes import _graph

Severity = Literal["wrong", "unsupported", "cuda", "info"]
"""wrong: other numbers on the CPU without an error. unsupported: no file. cuda: wrong on CUDA. info: worth knowing."""
MnnVersion = Literal["3.0", "3.5", "3.6"]


@dataclass(frozen=True)
class Facts:
    """What a rule may ask of the graph around a node."""

    target_mnn: MnnVersion
    run_time: frozenset[ir.Value]
    """Values that depend on a graph input in any way, its shape included."""
    run_time_data: frozenset[ir.Value]
    """Values that depend on a graph input's content: what follows from shapes alone is computed on the host."""
    local_functions: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class HazardKind:
    """One row of the table."""

    id: str
    severity: Severity
    mnn: str
    """Where it was seen: versions and back-end."""
    happens: str
    fix: str
    found: Callable[[ir.Node, Facts], bool]


_INTEGER = frozenset(
    {
        ir.DataType.BOOL,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
    }
)
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_REDUCTIONS_WITHOUT_AXES_INPUT = frozenset(
    {"ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"}
)
_UNARY = frozenset({"Abs", "BitwiseNot", "Neg", "Not", "Sign"})
_INTEGER_ARITHMETIC = frozenset(
    {"Add", "And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Or", "Sub", "Xor"}
)
_INT32 = np.iinfo(np.int32)


def _operator(*names: str) -> Callable[[ir.Node, Facts], bool]:
    return lambda node, facts: node.op_type in names and not node.domain


def _where_reads_else_out_of_bounds(node: ir.Node, facts: Facts) -> bool:
    # The converter broadcasts the branches only when the first one needs it.
    if node.op_type != "Where":
        return False
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


def _reduces_over_everything(node: ir.Node, facts: Facts) -> bool:
    if node.op_type not in _REDUCTIONS_WITHOUT_AXES_INPUT or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    axes = _graph.constant_tensor(node.inputs[1])
    data = node.inputs[0]
    if axes is None or data is None or data.shape is None:
        return True
    return len({int(axis) % len(data.shape) for axis in axes.numpy().reshape(-1)}) not in (0, len(data.shape))


def _resizes_one_dimension(node: ir.Node, facts: Facts) -> bool:
    if node.op_type != "Resize":
        return False
    data = node.inputs[0]
    one_dimension = data is None or data.shape is None or len(data.shape) == 3
    # Without a mode ONNX takes the nearest sample; MNN's converter does not.
    return one_dimension and node.attributes.get_string("mode", "linear") == "linear"


def _clamps_a_constant(node: ir.Node, facts: Facts) -> bool:
    for index, value in enumerate(node.inputs):
        tensor = _graph.constant_tensor(value)
        if tensor is None or tensor.dtype != ir.DataType.INT64 or not tensor.size:
            continue
        # To Slice a limit beyond the end means the end, clamped or not.
        if node.op_type == "Slice" and index in (1, 2):
            continue
        numbers = tensor.numpy()
        if numbers.max() > _INT32.max or numbers.min() < _INT32.min:
            return True
    return False


def _dequantises_what_mnn_does_not_expect(node: ir.Node, facts: Facts) -> bool:
    if node.op_type != "DequantizeLinear":
        return False
    data, scale = (_graph.constant_tensor(value) for value in node.inputs[:2])
    if data is None:
        return True
    per_axis = scale is None or scale.size != 1
    return per_axis and _graph.attribute_int(node, "axis", 1) % max(len(data.shape), 1) == 0


def _reads_half_from_a_file(node: ir.Node, facts: Facts) -> bool:
    tensors = (_graph.constant_tensor(value) for value in node.inputs)
    return any(isinstance(t, ir.ExternalTensor) and t.dtype == ir.DataType.FLOAT16 for t in tensors)


def _has_integer_data(node: ir.Node, facts: Facts) -> bool:
    data = [value for value in node.inputs if value is not None and value in facts.run_time_data]
    return any(value.dtype in _INTEGER for value in data)


def _integer_unary(node: ir.Node, facts: Facts) -> bool:
    return node.op_type in _UNARY and _has_integer_data(node, facts)


def _integer_division(node: ir.Node, facts: Facts) -> bool:
    return node.op_type in ("Div", "Mod") and _has_integer_data(node, facts)


def _integer_arithmetic(node: ir.Node, facts: Facts) -> bool:
    return node.op_type in _INTEGER_ARITHMETIC and _has_integer_data(node, facts)


def _gathers_from_the_end(node: ir.Node, facts: Facts) -> bool:
    if node.op_type != "Gather":
        return False
    indices = _graph.constant_tensor(node.inputs[1])
    return indices is not None and indices.size > 0 and bool((indices.numpy() < 0).any())


def _softmax_without_maximum(node: ir.Node, facts: Facts) -> bool:
    if node.op_type not in ("Softmax", "LogSoftmax") or facts.target_mnn == "3.6":
        return False
    return node.inputs[0] is None or not _graph.is_shifted_by_its_maximum(node.inputs[0])


def _weight_is_a_norm(node: ir.Node, facts: Facts) -> bool:
    if node.op_type not in _WEIGHTED or len(node.inputs) < 2 or node.inputs[1] in facts.run_time:
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


def _truncated_modulo(node: ir.Node, facts: Facts) -> bool:
    return node.op_type == "Mod" and _graph.attribute_int(node, "fmod", 0) == 1


def _calls_a_function(node: ir.Node, facts: Facts) -> bool:
    return (node.domain, node.op_type) in facts.local_functions


_CPU = "3.6.1, CPU, measured"
_CUDA = "up to 3.6.1, CUDA, from the source"

HAZARD_KINDS: tuple[HazardKind, ...] = (
    HazardKind(
        "where-broadcast-else",
        "wrong",
        _CPU,
        "when the first branch has the full shape and the second must be broadcast, the second is read out of bounds",
        "blend arithmetically, c·a + (1 − c)·b, or Expand the second branch",
        _where_reads_else_out_of_bounds,
    ),
    HazardKind(
        "reduce-axes-input",
        "wrong",
        _CPU,
        "axes given as an input (opset 18 on) are ignored, and all axes are reduced",
        "fuse the weight norm, or write Mul, ReduceSum, Sqrt",
        _reduces_over_everything,
    ),
    HazardKind(
        "resize-linear-1d",
        "wrong",
        _CPU,
        "linear Resize of one dimension gives zeros in about every third process that runs the same file",
        "give it a second spatial dimension of 1, or interpolate with a MatMul",
        _resizes_one_dimension,
    ),
    HazardKind(
        "round-half-to-even",
        "wrong",
        _CPU,
        "Round goes away from zero at halves, ONNX to even",
        "Floor(x + 0.5) if halves may go up, and say so",
        _operator("Round"),
    ),
    HazardKind(
        "modulo-truncated",
        "wrong",
        _CPU,
        "Mod with fmod = 1 takes the divisor's sign, not the dividend's",
        "x − k·Floor(x/k), or keep x non-negative",
        _truncated_modulo,
    ),
    HazardKind(
        "int64-constant",
        "wrong",
        _CPU,
        "integers are 32 bits wide; larger constants are clamped",
        "compute with floats, or with smaller numbers",
        _clamps_a_constant,
    ),
    HazardKind(
        "dequantize-after-gather",
        "wrong",
        _CPU,
        "DequantizeLinear of anything but a constant, or along its first axis, gives wrong numbers",
        "Cast, then multiply by the gathered scale",
        _dequantises_what_mnn_does_not_expect,
    ),
    HazardKind(
        "half-external-data",
        "wrong",
        _CPU,
        "float16 initialisers in external data are misread: the model does not load, or computes noise",
        "keep initialisers float32 and let the converter halve them",
        _reads_half_from_a_file,
    ),
    HazardKind(
        "not-supported",
        "unsupported",
        _CPU,
        "the converter does not know the operator and writes no file",
        "export at opset 18, where it decomposes, and use additive float masks",
        _operator("IsNaN", "IsInf", "GroupNormalization", "RMSNormalization", "Attention", "RotaryEmbedding", "Mish"),
    ),
    HazardKind(
        "local-function",
        "unsupported",
        _CPU,
        "the converter does not know functions of the model's own and writes no file",
        "inline them",
        _calls_a_function,
    ),
    HazardKind(
        "integer-unary",
        "cuda",
        _CUDA,
        "the float kernel runs on the integer's bits",
        "enter masks as floats and keep them additive",
        _integer_unary,
    ),
    HazardKind(
        "integer-division",
        "cuda",
        _CUDA,
        "integer division is not dispatched",
        "divide floats, then Floor",
        _integer_division,
    ),
    HazardKind(
        "integer-arithmetic",
        "info",
        _CUDA,
        "integer and boolean arithmetic is the least tested part of the back-end",
        "enter masks as floats and keep them additive",
        _integer_arithmetic,
    ),
    HazardKind(
        "gather-negative",
        "info",
        _CPU,
        "with --optimizeLevel 2 the guard for negative indices is dropped and the wrong rows are read",
        "count from the front, or convert with --optimizeLevel 1, the default",
        _gathers_from_the_end,
    ),
    HazardKind(
        "softmax-low-rows",
        "info",
        "up to 3.5.0, CUDA, from the source",
        "rows whose maximum is below about −70 come out wrong on axes longer than 32",
        "subtract_row_maximum, or convert for 3.6",
        _softmax_without_maximum,
    ),
    HazardKind(
        "unfused-weight-norm",
        "info",
        _CPU,
        "right as Mul, ReduceSum, Sqrt, which the converter folds; wrong as ReduceL2 (see reduce-axes-input)",
        "run fuse_weight_norm",
        _weight_is_a_norm,
    ),
)
