"""From what a `.mnn` stores back to real numbers, the way MNN itself does it when it loads a model.

An integer q of a symmetric row is q·scale; of an asymmetric row q·scale + (minimum − q₀·scale), where q₀ is the
integer that the minimum stands for; all in float32, in this order (MNN's `ConvolutionCommon::load`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sa3_convert.errors import ModelFileError, UsageError
from sa3_convert.mnn.file.contents import ModelStorage, OperatorStorage
from sa3_convert.mnn.file.flatbuffer import ModelBytes, Table, unusable
from sa3_convert.mnn.file.schema import Convolution, InnerProduct, Kind, Net, Op, Quantised, SubGraph
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.mnn.file.weights import Codebook, Packed, WeightStorage, is_oldest_form, read_dense, read_sparse

_GROUPS: Final = 1 << 17
"""Groups of eight packed indices that are unpacked at a time."""
_INTEGER_ARITHMETIC: Final = 10
"""Field of the quantised parameter."""
_LARGEST_SPARSE: Final = 1 << 26
"""A sparse weight may be larger than its file; this many elements take 256 MiB."""


def dequantised_weight(path: Path, operator: str, *, storage: ModelStorage | None = None) -> NDArray[np.float32]:
    """Return the real numbers that an operator's stored weight stands for.

    Args:
        path: the model.
        operator: its name.
        storage: what `read_storage(path)` returned, if the caller has it.

    Returns:
        float32 of the shape that the storage states: [out, in per group, kernel…].

    Raises:
        ModelFileError: the file is damaged, or the operator calculates with integers, so that its weights alone do
            not stand for numbers.
        UsageError: there is no such operator, or it has no weight.

    """
    storage = storage or read_storage(path)
    found = next((named for named, _ in storage.weighted() if named.name == operator), None)
    if found is None or found.weight is None:
        names = [named.name for named, _ in storage.weighted()]
        raise UsageError(f"{path} has no layer {operator!r} with a weight; it has: {', '.join(names[:20])}.")
    weight = found.weight
    try:
        # Scales of a damaged file may overflow; the numbers are reported as they come.
        with ModelBytes(path) as model, np.errstate(all="ignore"):
            return _decoded(model, weight, _form(model, storage, found)).reshape(weight.shape)
    except ModelFileError as fault:
        raise unusable(path, fault) from None


@dataclass(frozen=True)
class _Form:
    """What only whoever calculates with integer weights needs of their table."""

    wide_shape: bool = False
    minimum: int = -128
    """Integer that an asymmetric row's minimum stands for."""
    multiplier: float = 1.0


def _form(model: ModelBytes, storage: ModelStorage, operator: OperatorStorage) -> _Form:
    table = _quantised(model, storage.operators.index(operator), operator.parameter_kind)
    if table is None or operator.weight is None:
        return _Form()
    plain = table.flag(_INTEGER_ARITHMETIC) or is_oldest_form(table, operator.weight.stored)
    multiplier = 1.0 if plain else table.real(Quantised.MULTIPLIER)
    return _Form(table.flag(Quantised.WIDE_SHAPE), table.integer(Quantised.MINIMUM) or -128, multiplier)


def _quantised(model: ModelBytes, index: int, kind: int) -> Table | None:
    net = model.buffer.root()
    operators = [*net.tables(Net.OPERATORS)]
    for graph in net.tables(Net.SUBGRAPHS):
        operators += graph.tables(SubGraph.OPERATORS)
    parameter = operators[index].table(Op.PARAMETER)
    if parameter is None or kind == Kind.CONVOLUTION_3D:
        return None
    return parameter.table(InnerProduct.QUANTISED if kind == Kind.INNER_PRODUCT else Convolution.QUANTISED)


def _decoded(model: ModelBytes, weight: WeightStorage, form: _Form) -> NDArray[np.float32]:
    if weight.activations_too:
        raise ModelFileError("the layer calculates with integers, so its weights alone are no numbers")
    match weight.stored:
        case "float":
            return np.frombuffer(model.read(weight.payload), "<f4").astype(np.float32)
        case "half":
            return np.frombuffer(model.read(weight.payload), "<f2").astype(np.float32)
        case "sparse_float":
            return _sparse_floats(model, weight)
    scales = _scales(model, weight)
    match weight.stored:
        case "int8":
            integers = np.frombuffer(model.read(weight.payload), np.int8).astype(np.float32)
        case "codebook":
            integers = _dense(model, weight, form)
        case "sparse_codebook":
            integers = _sparse(model, weight, scales, form)
    if not weight.symmetric and form.minimum < 0:
        scales[:, 0] -= np.float32(form.minimum) * scales[:, 1]
    if form.multiplier != 1.0:
        scales *= np.float32(form.multiplier)
    rows = integers.reshape(weight.rows, -1)
    rows *= scales[:, -1:]
    if not weight.symmetric:
        rows += scales[:, :1]
    return integers


def _scales(model: ModelBytes, weight: WeightStorage) -> NDArray[np.float32]:
    """Return the numbers as stored: [rows, 1] of scales, or [rows, 2] of minimum and scale."""
    assert weight.scales is not None
    dtype = "<f2" if weight.scale_type == "fp16" else "<f4"
    return np.frombuffer(model.read(weight.scales), dtype).astype(np.float32).reshape(weight.rows, -1)


def _dense(model: ModelBytes, weight: WeightStorage, form: _Form) -> NDArray[np.float32]:
    book = read_dense(
        lambda start, size: model.read(weight.payload, start, size), weight.payload.bytes, wide=form.wide_shape
    )
    values = _sorted_values(book)
    out = np.empty(book.elements, np.float32)
    for start, indices in _unpacked(model, weight, book.indices):
        out[start : start + indices.size] = _looked_up(values, indices)
    return out


def _sparse(model: ModelBytes, weight: WeightStorage, scales: NDArray[np.float32], form: _Form) -> NDArray[np.float32]:
    book = read_sparse(
        lambda start, size: model.read(weight.payload, start, size), weight.payload.bytes, wide=form.wide_shape
    )
    assert book.steps is not None
    if book.elements > _LARGEST_SPARSE:
        raise ModelFileError(f"a sparse weight has {book.elements} elements")
    out = np.zeros((weight.rows, book.elements // weight.rows), np.float32)
    if not weight.symmetric:
        # What is left out is the integer nearest to zero, rounded half away from it.
        lowest, scale = -(1 << (book.indices.bits - 1)), scales[:, 1]
        usable = scale > np.float32(1e-6)
        steps_up = -scales[:, 0] / np.where(usable, scale, np.float32(1))
        nearest = np.where(usable, np.trunc(steps_up + np.copysign(np.float32(0.5), steps_up)), 0) + lowest
        out += nearest[:, None].astype(np.float32)
    steps = np.concatenate([piece for _, piece in _unpacked(model, weight, book.steps)])
    indices = np.concatenate([piece for _, piece in _unpacked(model, weight, book.indices)])
    positions = np.cumsum(steps, dtype=np.int64)
    if positions[-1] >= book.elements:
        raise ModelFileError("a sparse weight has entries beyond its shape")
    flat = out.reshape(-1)
    flat[positions] = _looked_up(_sorted_values(book), indices)
    return flat


def _sparse_floats(model: ModelBytes, weight: WeightStorage) -> NDArray[np.float32]:
    assert weight.indices is not None
    if weight.elements > _LARGEST_SPARSE:
        raise ModelFileError(f"a sparse weight has {weight.elements} elements")
    positions = np.frombuffer(model.read(weight.indices), "<u4")
    if positions.size and int(positions.max()) >= weight.elements:
        raise ModelFileError("a sparse weight has entries beyond its shape")
    out = np.zeros(weight.elements, np.float32)
    out[positions] = np.frombuffer(model.read(weight.payload), "<f4")
    return out


def _sorted_values(book: Codebook) -> NDArray[np.float32]:
    return np.sort(np.frombuffer(book.values, np.int8)).astype(np.float32)


def _looked_up(values: NDArray[np.float32], indices: NDArray[np.uint8]) -> NDArray[np.float32]:
    if int(indices.max(initial=0)) >= values.size:
        raise ModelFileError(f"a weight uses value {int(indices.max())} of {values.size}")
    return values[indices]


def _unpacked(model: ModelBytes, weight: WeightStorage, packed: Packed) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (first element, indices), piece by piece: eight indices of b bits stand in b bytes, high bits first."""
    shifts = np.arange(7, -1, -1, dtype=np.uint64) * np.uint64(packed.bits)
    for start in range(0, packed.count, 8 * _GROUPS):
        count = min(8 * _GROUPS, packed.count - start)
        size = -(-count * packed.bits // 8)
        raw = np.frombuffer(model.read(weight.payload, packed.start + start * packed.bits // 8, size), np.uint8)
        if packed.bits == 8:
            yield start, raw
            continue
        groups = np.zeros((-(-count // 8), packed.bits), np.uint8)
        groups.reshape(-1)[:size] = raw
        word = np.zeros(groups.shape[0], np.uint64)
        for byte in groups.T:
            word = (word << np.uint64(8)) | byte
        indices = (word[:, None] >> shifts) & np.uint64((1 << packed.bits) - 1)
        yield start, indices.astype(np.uint8).reshape(-1)[:count]
