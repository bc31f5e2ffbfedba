"""Constants that must keep float32's precision survive a converter that halves every float constant.

MNN's `--fp16` stores all float constants as half, π and the frequencies of Fourier features and rotary positions too.
Phases reach 6·10⁴ rad there, so their sines and cosines become noise: a DiT falls to 5–15 dB. Each such constant c is
therefore put together at run time from parts that half holds exactly:

    c = Σₖ one·2^-sₖ · pₖ        pₖ has 11 significant bits and is scaled into half's normal range

`one` is Clip(x, 1, 1) of one element of a graph input, so it depends on the input for the converter, which then cannot
fold the sum, and is 1 for every input. Three parts hold the 24 bits of any float32, and as sums of disjoint bits they
add up without rounding: what follows sees the same c as in float32, bit for bit, whatever order it is multiplied in.

Put together are
- constants that the input of a Sin or Cos is made with: factors, divisors and summands, through reshapes and casts,
- divisors whose reciprocal half does not hold exactly, anywhere: the converter turns x / c into x · (1/c),
- constants outside half's range: a magnitude above 65504, and factors that are all below half's normal range.

Nothing is done with
- other constants that half holds exactly, and phases that depend on no input: they are folded before they are halved,
- what a Linear or convolution inside a phase uses: its rounding is that of any other weight,
- summands between 6·10⁻⁸ and 6·10⁻⁵, such as the eps of a norm: they move by less than 6·10⁻⁸,
- bounds of Clip, which MNN keeps in float32.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.errors import ConversionError
from sa3_convert.passes import ir_tools
from sa3_convert.passes.half import HALF_LARGEST, HALF_NORMAL, HALF_SMALLEST, exact_parts, is_exact_in_half

_RESHAPING = frozenset(
    {"Cast", "Concat", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
_ARITHMETIC = frozenset({"Add", "Div", "MatMul", "Mul", "Neg", "Sub"})
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_LARGEST_CONSTANT = 1 << 16
"""Elements: a frequency table has at most a few thousand; a larger constant is a weight or a lookup table."""
_SCALE_EXPONENTS = (-14, 15)


def make_fp16_safe(model: ir.Model) -> int:
    """Put together, in place, each constant that halving would spoil.

    Returns:
        How many constants were replaced.

    Raises:
        ConversionError: a weight or lookup table does not fit half's range, or the model has no input to build on.

    """
    uses = _phase_uses(model.graph)
    uses += [use for use in _divisor_uses(model.graph) if use not in uses]
    uses += [use for use in _out_of_range_uses(model.graph) if use not in uses]
    if not uses:
        return 0
    assembly = _Assembly(model.graph)
    for use in uses:
        use.node.replace_input_with(use.index, assembly.value_of(use.constant))
    assembly.insert()
    ir_tools.remove_unused(model.graph, {use.constant.name: use.constant for use in uses}.values())
    return len(assembly.built)


@dataclass(frozen=True)
class _Use:
    node: ir.Node
    index: int

    @property
    def constant(self) -> ir.Value:
        value = self.node.inputs[self.index]
        assert value is not None
        return value


def _phase_uses(graph: ir.Graph) -> list[_Use]:
    """Return where inexact constants enter the phases of Sin and Cos, each once."""
    at_run_time = ir_tools.depends_on_inputs(graph)
    found: dict[_Use, None] = {}
    seen: set[ir.Node] = set()
    phases = [node.inputs[0] for node in graph if node.op_type in ("Sin", "Cos")]
    pending = [phase for phase in phases if phase in at_run_time]
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        if node is None or node in seen or node.op_type not in _RESHAPING | _ARITHMETIC or _is_linear(node):
            continue
        seen.add(node)
        # Only the first input of a reshape is data, but for Concat's.
        data = node.inputs[:1] if node.op_type in _RESHAPING - {"Concat"} else node.inputs
        for index, used in enumerate(data):
            if used is None or _is_bias(node, index):
                continue
            table = _table(used)
            if table is not None and not is_exact_in_half(table):
                found[_Use(node, index)] = None
            pending.append(used)
    return list(found)


def _divisor_uses(graph: ir.Graph) -> list[_Use]:
    at_run_time = ir_tools.depends_on_inputs(graph)
    found = []
    for node in graph:
        if node.op_type != "Div" or node.outputs[0] not in at_run_time:
            continue
        divisor = _table(node.inputs[1])
        if divisor is not None and divisor.all() and not is_exact_in_half(np.float32(1) / divisor):
            found.append(_Use(node, 1))
    return found


def _table(value: ir.Value | None) -> NDArray[np.float32] | None:
    """Return a float32 constant that is small enough for a table."""
    tensor = ir_tools.constant_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size > _LARGEST_CONSTANT:
        return None
    return np.asarray(tensor.numpy(), np.float32)


def _is_linear(node: ir.Node) -> bool:
    """Whether a MatMul sums over more than one product; with one it is an outer product, as phases are."""
    if node.op_type != "MatMul":
        return False
    left, right = (None if value is None else value.shape for value in node.inputs)
    inner = [shape[axis] for shape, axis in ((left, -1), (right, -2)) if shape is not None and len(shape) >= -axis]
    return 1 not in inner


def _is_bias(node: ir.Node, index: int) -> bool:
    """Whether an input is what an Add gives to the result of a linear."""
    if node.op_type != "Add" or ir_tools.constant_tensor(node.inputs[index]) is None:
        return False
    other = node.inputs[1 - index]
    producer = None if other is None else other.producer()
    return producer is not None and (producer.op_type in _WEIGHTED - {"MatMul"} or _is_linear(producer))


def _out_of_range_uses(graph: ir.Graph) -> list[_Use]:
    found = []
    for node in graph:
        for index, value in enumerate(node.inputs):
            tensor = ir_tools.constant_tensor(value)
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or node.op_type == "Clip" or not tensor.size:
                continue
            if not _leaves_range(np.asarray(tensor.numpy(), np.float32), summand=node.op_type in ("Add", "Sub")):
                continue
            if tensor.size > _LARGEST_CONSTANT or (node.op_type in _WEIGHTED and index == 1):
                raise ConversionError(
                    f"{value.name if value else ''!r} ({node.op_type} {node.name!r}) does not fit float16's range, so "
                    "this component cannot be stored with floats: fp16; use floats: fp32 in its recipe."
                )
            found.append(_Use(node, index))
    return found


def _leaves_range(array: NDArray[np.float32], *, summand: bool) -> bool:
    magnitudes = np.abs(array[np.isfinite(array) & (array != 0)])
    if not magnitudes.size:
        return False
    largest = float(magnitudes.max())
    return largest > HALF_LARGEST or largest < (HALF_SMALLEST if summand else HALF_NORMAL)


@dataclass
class _Assembly:
    """The nodes that put constants together; they go in front of all others."""

    graph: ir.Graph
    built: dict[str, ir.Value] = field(default_factory=dict)
    _powers: dict[int, ir.Value] = field(default_factory=dict)
    _anchor: ir.Value | None = None

    def __post_init__(self) -> None:
        self._new = ir_tools.Additions(self.graph)

    def value_of(self, constant: ir.Value) -> ir.Value:
        """Return the run-time value that equals a constant."""
        assert constant.name is not None
        if constant.name not in self.built:
            array = np.asarray(ir_tools.array(constant), np.float32)
            if not np.isfinite(array).all():
                raise ConversionError(
                    f"{constant.name!r} holds infinities beside numbers that float16 cannot hold; use floats: fp32 in "
                    "this component's recipe, or a mask value that float16 reaches."
                )
            self.built[constant.name] = self._sum(constant.name, array)
        return self.built[constant.name]

    def insert(self) -> None:
        """Put the nodes in front."""
        self._new.insert_before(next(iter(self.graph)))

    def _sum(self, name: str, array: NDArray[np.float32]) -> ir.Value:
        total: ir.Value | None = None
        for number, (part, exponent) in enumerate(exact_parts(array)):
            stored = self._new.constant(f"{name}.part_{number}", part)
            term = self._new.node("Mul", [self._power(exponent), stored], f"{name}.term_{number}", shape=array.shape)
            if total is not None:
                term = self._new.node("Add", [total, term], f"{name}.sum_{number}", shape=array.shape)
            total = term
        assert total is not None, "a constant of zeros is exact in half"
        return total

    def _power(self, exponent: int) -> ir.Value:
        """Return 2^exponent as a run-time scalar."""
        if exponent not in self._powers:
            low, high = _SCALE_EXPONENTS
            near = min(max(exponent, low), high)
            if near == exponent:
                bound = self._new.constant(f"exact.power_{exponent}", np.float32(2.0) ** np.float32(exponent))
                inputs, operator = [self._runtime_scalar(), bound, bound], "Clip"
            else:
                inputs, operator = [self._power(near), self._power(exponent - near)], "Mul"
            self._powers[exponent] = self._new.node(operator, inputs, f"exact.two_to_{exponent}", shape=())
        return self._powers[exponent]

    def _runtime_scalar(self) -> ir.Value:
        """Return one element of the smallest graph input, as a float32 scalar."""
        if self._anchor is not None:
            return self._anchor
        inputs = [v for v in self.graph.inputs if v.shape is not None and v.name not in self.graph.initializers]
        if not inputs:
            raise ConversionError(
                "The model has no inputs of known rank, so its constants cannot be kept from halving."
            )
        value = min(inputs, key=_elements)
        assert value.shape is not None
        rank = len(value.shape)
        if _elements(value) > 1:
            zeros = self._new.constant("exact.starts", np.zeros(rank, np.int64))
            ones = self._new.constant("exact.ends", np.ones(rank, np.int64))
            value = self._new.node("Slice", [value, zeros, ones], "exact.element", value.dtype, (1,) * rank)
        if value.dtype != ir.DataType.FLOAT:
            value = self._new.node("Cast", [value], "exact.float", shape=(1,) * rank, to=ir.DataType.FLOAT.value)
        if rank:
            shape = self._new.constant("exact.shape", np.zeros(0, np.int64))
            value = self._new.node("Reshape", [value, shape], "exact.scalar", shape=())
        self._anchor = value
        return value


def _elements(value: ir.Value) -> float:
    """Return how many elements an input has; infinity if a dimension is symbolic."""
    assert value.shape is not None
    count = 1.0
    for dimension in value.shape:
        count *= dimension if isinstance(dimension, int) else float("inf")
    return count
