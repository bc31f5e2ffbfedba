"""Halves: what they can hold, floats as sums of them, constants rounded to them, and models that compute with them."""

from collections.abc import Mapping, Set
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.passes import ir_tools

HALF_LARGEST = 65504.0
HALF_NORMAL = 2.0**-14
"""Smallest magnitude with all 11 bits."""
HALF_SMALLEST = 2.0**-24
"""Smallest magnitude that is not zero."""

FLOORS_DB: Final[Mapping[Component, float]] = {
    Component.TEXT_ENCODER: 55,
    Component.NUMBER_CONDITIONER: 60,
    Component.DIT: 50,
    Component.DECODER: 55,
    Component.ENCODER: 55,
}
"""Least signal-to-noise ratio in dB of a model that `compute_in_half` made, against its reference."""

_SIGNIFICANT_BITS = 11
_TOP_EXPONENT = 15
_ROWS_AT_ONCE = 1 << 22


def is_exact_in_half(array: NDArray[np.float32]) -> bool:
    """Whether halving changes no element (and none lies where some back-ends flush to zero)."""
    finite = array[np.isfinite(array)]
    magnitudes = np.abs(finite[finite != 0])
    in_range = bool(((magnitudes >= HALF_NORMAL) & (magnitudes <= HALF_LARGEST)).all())
    return in_range and bool((finite.astype(np.float16).astype(np.float32) == finite).all())


def exact_parts(array: NDArray[np.float32]) -> list[tuple[NDArray[np.float32], int]]:
    """Split a finite float32 array into (part, exponent) pairs with array = Σ part · 2^exponent, exactly.

    The elements of a part are zero or normal half numbers; three do unless magnitudes differ by more than about 2¹⁸.
    """
    if not np.isfinite(array).all():
        raise ValueError("only finite numbers can be split")
    rest = array.astype(np.float64)
    parts = []
    while rest.any():
        exponent = int(np.frexp(np.abs(rest).max())[1]) - _TOP_EXPONENT
        mantissa, power = np.frexp(np.ldexp(rest, -exponent))
        part = np.ldexp(np.round(np.ldexp(mantissa, _SIGNIFICANT_BITS)), power - _SIGNIFICANT_BITS)
        part = np.where(np.abs(part) >= HALF_NORMAL, part, 0.0)
        parts.append((part.astype(np.float32), exponent))
        rest = rest - np.ldexp(part, exponent)
    return parts


def round_to_half(model: ir.Model, kept: Set[str] = frozenset()) -> int:
    """Round float32 initialisers to the nearest half number, still stored as float32, in place; return how many.

    Each is computed when the model is saved, so no two weights need be in memory at once. Magnitudes beyond 65504 keep
    their value for `fp16_safe` to judge; infinities stay, and so does what is in `kept`, which will be integers.
    """
    count = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if name in kept or tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        value.const_value = _rounded(tensor)
        count += 1
    return count


def _rounded(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        source = tensor.numpy()
        flat = np.ascontiguousarray(source).reshape(-1)
        result = np.empty(flat.shape, np.float32)
        for start in range(0, flat.size, _ROWS_AT_ONCE):
            piece = flat[start : start + _ROWS_AT_ONCE]
            # A magnitude beyond half's range would become infinite.
            kept = np.isfinite(piece) & (np.abs(piece) > HALF_LARGEST)
            with np.errstate(over="ignore"):
                result[start : start + _ROWS_AT_ONCE] = np.where(kept, piece, piece.astype(np.float16))
        return ir.Tensor(result.reshape(source.shape), name=tensor.name)

    return ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)


_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_MOVING = frozenset({"Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"})
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def pass_through_half(model: ir.Model) -> None:
    """Round every float32 number of a model to a half and back, in place; constants when the model is saved.

    Inputs, constants, and what each operator makes: so MNN computes on ARM at precision low, on phones. But there
    products and convolutions add up in halves too, while here sums within an operator stay float32. Phases that are
    lost show to 0.1 dB; where this says 55 to 64 dB of toy models, ARM has 49 to 50, and wide layers have longer sums.

    Raises:
        ConversionError: it is not known of what type a value is.

    """
    common.ShapeInferencePass()(model)
    graph = model.graph
    additions = ir_tools.Additions(graph)
    made = [value for node in graph for value in node.outputs if value.name]
    if unknown := next((value.name for value in made if value.dtype is None), None):
        raise ConversionError(f"It is not known of what type {unknown} is, so half arithmetic cannot be emulated.")
    round_to_half(model)
    for value in (*graph.inputs, *made):
        readers, producer = value.uses(), value.producer()
        if value.dtype is not ir.DataType.FLOAT or not readers:
            continue
        half = additions.node("Cast", [value], f"{value.name}.half", ir.DataType.FLOAT16, to=ir.DataType.FLOAT16)
        rounded = additions.node("Cast", [half], f"{value.name}.rounded", to=ir.DataType.FLOAT)
        for reader, index in readers:
            reader.replace_input_with(index, rounded)
        if producer is None:
            additions.insert_before(graph[0])
        else:
            graph.insert_after(producer, additions.nodes)
            additions.nodes = []


def compute_in_half(model: ir.Model) -> int:
    """Let matrix products, convolutions and the token table store and compute halves, in place; return how many do.

    All between them stays float32: Fourier features and rotary positions, whose phases half cannot hold, norms,
    softmax, activations and what blocks add up; so do the model's inputs and outputs. What only moves numbers takes
    them as they come. Weights are computed when the model is saved.

    Raises:
        ConversionError: a weight does not fit half's range (when it is saved), or a type cannot be inferred.

    """
    common.ShapeInferencePass()(model)
    graph = model.graph
    casts = _Casts(graph)
    count = 0
    for node in list(graph):
        inputs = [(index, value) for index, value in enumerate(node.inputs) if value is not None]
        floats = [(index, value) for index, value in inputs if value.dtype in _TYPES]
        computes = _computes(node)
        moves = node.op_type in _MOVING and floats and all(value.dtype is _TYPES[1] for _, value in floats)
        wanted = _TYPES[1] if computes or moves else _TYPES[0]
        for index, value in floats:
            if value.dtype is not wanted:
                node.replace_input_with(index, casts.of(value, wanted))
        if wanted is _TYPES[1]:
            for output in node.outputs:
                output.dtype = wanted
        count += computes
    for index, value in enumerate(graph.outputs):
        if value.dtype is _TYPES[1]:
            graph.outputs[index] = casts.renamed(value)
    return count


def _computes(node: ir.Node) -> bool:
    """Whether a node is a product, or looks a row up. A MatMul over one number is an outer product, as phases are."""
    first, second = (*node.inputs, None)[:2] if node.inputs else (None, None)
    if node.op_type == "Gather":
        return first is not None and first.dtype in _TYPES and ir_tools.constant_tensor(first) is not None
    if node.op_type != "MatMul":
        return node.op_type in _LINEAR
    shape = None if second is None else second.shape
    return shape is None or len(shape) < 2 or shape[-2] != 1


def check_halves(model: ir.Model) -> None:
    """Raise ConversionError unless the weights of every product of a saved model are halves."""
    products = [node for node in model.graph if _computes(node)]
    weights = [v for node in products for v in node.inputs if ir_tools.constant_tensor(v) is not None]
    left = [v.name for v in weights if v is not None and v.dtype is _TYPES[0]]
    if left or not weights:
        raise ConversionError(
            f"It has {len(left)} float32 weights of {len(weights)} where it should have halves alone."
        )


class _Casts:
    """Values in another type, each made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._additions = ir_tools.Additions(graph)
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def of(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        key = value, dtype
        if key not in self._made:
            self._made[key] = self._stored(value) or self._cast(value, dtype, f"{value.name}.{dtype.name.lower()}")
        return self._made[key]

    def renamed(self, value: ir.Value) -> ir.Value:
        """Return the output of a graph in float32, under its own name."""
        name, value.name = value.name, self._additions.name(f"{value.name}.float16")
        output = self._cast(value, _TYPES[0], f"{name}.float")
        output.name = name
        return output

    def _stored(self, value: ir.Value) -> ir.Value | None:
        """Return a weight as half: itself where only products read it."""
        tensor = value.const_value
        if tensor is None or value.name not in self._graph.initializers or value.is_graph_input():
            return None
        if not all(_computes(node) for node, _ in value.uses()):
            return None
        value.const_value, value.dtype = _halved(tensor), _TYPES[1]
        return value

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        cast = self._additions.node("Cast", [value], name, dtype, value.shape, to=dtype.value)
        producer = value.producer()
        if producer is None:
            self._additions.insert_before(self._graph[0])
        else:
            self._graph.insert_after(producer, self._additions.nodes)
            self._additions.nodes = []
        return cast


def _halved(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):
            halves = tensor.numpy().astype(np.float16)
        if not np.isfinite(halves).all():
            raise ConversionError(f"{tensor.name} does not fit float16's range, so there is no ONNX in fp16 of it.")
        return ir.Tensor(halves, name=tensor.name)

    return ir.LazyTensor(evaluate, dtype=_TYPES[1], shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
