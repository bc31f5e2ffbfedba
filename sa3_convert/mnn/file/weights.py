"""How one layer's weights are stored: its parameter table, and the packed integers that it leads to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from sa3_convert.errors import ModelFileError
from sa3_convert.mnn.file.flatbuffer import Extent, ModelBytes, Table
from sa3_convert.mnn.file.schema import (
    CONVOLUTION_3D_EXTERNAL,
    Common,
    Common3D,
    Convolution,
    Encoding,
    InnerProduct,
    Int8,
    Kind,
    Quantised,
)

Read = Callable[[int, int], bytes]
"""(start, size) → bytes of the weight's buffer; refuses what lies outside."""

_MAX_RANK: Final = 4


@dataclass(frozen=True, slots=True)
class Packed:
    """A run of packed unsigned integers."""

    start: int
    count: int
    bits: int

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""
        return -(-self.count * self.bits // 8)


@dataclass(frozen=True, slots=True)
class Codebook:
    """What the head of a buffer of integer weights says."""

    elements: int
    values: bytes
    """The integers, int8, as stored; indices refer to them in ascending order."""
    indices: Packed
    steps: Packed | None = None
    """Distances between the entries of a sparse weight."""


def read_dense(read: Read, size: int, *, wide: bool) -> Codebook:
    """Parse the head of a dense buffer, which must fit its `size` in bytes."""
    elements, position = _shape(read, wide=wide)
    values, position = _values(read, position)
    book = Codebook(elements, values, Packed(position, elements, _index_bits(values)))
    return _checked(book, size)


def read_sparse(read: Read, size: int, *, wide: bool) -> Codebook:
    """Parse the head of a sparse buffer, which must fit its `size` in bytes."""
    elements, position = _shape(read, wide=wide)
    entries = int.from_bytes(read(position, 4), "little")
    step_bits = read(position + 4, 1)[0]
    steps = Packed(position + 5, entries, step_bits)
    # A longer run of zeros has an entry in between, so the shape cannot be arbitrarily larger than the buffer.
    if not 1 <= step_bits <= 8 or not 0 < entries <= elements <= (entries + 1) << 8:
        raise ModelFileError(f"a sparse weight of {elements} elements has {entries} entries of {step_bits}-bit steps")
    values, position = _values(read, steps.start + steps.bytes)
    return _checked(Codebook(elements, values, Packed(position, entries, _index_bits(values)), steps), size)


def _checked(book: Codebook, size: int) -> Codebook:
    end = book.indices.start + book.indices.bytes
    if end != size:
        raise ModelFileError(f"a weight of {book.elements} elements should take {end} bytes and takes {size}")
    return book


def _shape(read: Read, *, wide: bool) -> tuple[int, int]:
    rank = read(0, 1)[0]
    if not 1 <= rank <= _MAX_RANK:
        raise ModelFileError(f"a weight has {rank} dimensions")
    width = 4 if wide else 2
    raw = read(1, rank * width)
    dimensions = [int.from_bytes(raw[at : at + width], "little") for at in range(0, len(raw), width)]
    if not all(dimensions):
        raise ModelFileError("a weight has an empty dimension")
    return math.prod(dimensions), 1 + len(raw)


def _values(read: Read, position: int) -> tuple[bytes, int]:
    count = read(position, 1)[0] or 256
    return read(position + 1, count), position + 1 + count


def _index_bits(values: bytes) -> int:
    return max(1, (len(values) - 1).bit_length())


Stored = Literal["float", "half", "codebook", "sparse_codebook", "int8", "sparse_float"]

_OLDEST_ASYMMETRIC: Final = 1e-6


@dataclass(frozen=True, slots=True)
class WeightStorage:
    """What a file holds of one weight."""

    type: str
    """`fp32`, `fp16`, or `int2` to `int8`, by the number of values that an element can take."""
    stored: Stored
    shape: tuple[int, ...]
    """[out, in per group, kernel…]; the order of a convolution's weight in ONNX."""
    payload: Extent
    scales: Extent | None = None
    scale_type: Literal["fp32", "fp16"] | None = None
    rows: int = 0
    """Runs of elements with a scale of their own; each has one number, an asymmetric one two (minimum, scale)."""
    symmetric: bool | None = None
    block_size: int | None = None
    """Input channels that share a scale; None: one scale per output channel (or, with one row, for all)."""
    indices: Extent | None = None
    """Positions of a sparse weight's elements."""
    activations_too: bool = False
    """Whether the layer calculates with integers: then its scales hold more than the weights'."""

    @property
    def bits(self) -> int:
        """Bits per element."""
        return int(self.type.removeprefix("fp").removeprefix("int"))

    @property
    def is_quantised(self) -> bool:
        """Whether integers are stored."""
        return self.type.startswith("int")

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def scale_bytes(self) -> int:
        """Bytes of scales (and minima)."""
        return 0 if self.scales is None else self.scales.bytes


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a layer says of its weight's shape."""

    outputs: int
    kernel: tuple[int, ...] = ()

    def shape(self, elements: int) -> tuple[int, ...]:
        """Return [out, in per group, kernel…] of a weight of so many elements."""
        unit = self.outputs * math.prod(self.kernel[:3])
        if len(self.kernel) > 3 or self.outputs < 1 or any(size < 1 for size in self.kernel) or elements % unit:
            raise ModelFileError(
                f"{elements} weights do not divide into {self.outputs} outputs with kernel {list(self.kernel[:3])}"
            )
        return (self.outputs, elements // unit, *self.kernel)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer's weight and bias; either may be absent."""

    weight: WeightStorage | None
    bias: Extent | None


def layer_weights(model: ModelBytes, kind: int, table: Table, *, integer_layer: bool) -> LayerWeights:
    """Return the weight and bias of a parameter table of this kind; `integer_layer` has integer activations."""
    match kind:
        case Kind.CONVOLUTION_2D:
            return _convolution(model, table, integer_layer=integer_layer)
        case Kind.CONVOLUTION_3D:
            return _convolution_3d(model, table)
        case Kind.INNER_PRODUCT:
            return _inner_product(model, table)
        case _:
            return LayerWeights(None, None)


def _convolution(model: ModelBytes, table: Table, *, integer_layer: bool) -> LayerWeights:
    common = table.table(Convolution.COMMON)
    if common is None:
        raise ModelFileError("a convolution without geometry")
    kernel = (common.integer(Common.KERNEL_Y, default=1), common.integer(Common.KERNEL_X, default=1))
    geometry = Geometry(common.integer(Common.OUTPUTS), kernel)
    sections = model.sections(table.integers(Convolution.EXTERNAL, "q"))
    quantised = table.table(Convolution.QUANTISED)
    int8 = table.table(Convolution.INT8) if integer_layer else None
    bias = table.extent(Convolution.BIAS, 4)
    if quantised is not None:
        weight = _quantised(model, quantised, geometry, sections, int8)
        return LayerWeights(weight, _first(bias, sections, 2))
    if int8 is not None:
        payload = _first(int8.extent(Int8.WEIGHT, 1))
        weight = None if payload is None else _integers("int8", "int8", geometry, payload.bytes, payload, int8=int8)
        return LayerWeights(weight, _first(int8.extent(Int8.BIAS, 4)))
    return LayerWeights(
        _floats(geometry, _first(table.extent(Convolution.WEIGHT, 4), sections, 0)), _first(bias, sections, 1)
    )


def _convolution_3d(model: ModelBytes, table: Table) -> LayerWeights:
    common = table.table(Convolution.COMMON)
    if common is None:
        raise ModelFileError("a convolution without geometry")
    geometry = Geometry(common.integer(Common3D.OUTPUTS), common.integers(Common3D.KERNELS))
    sections = model.sections(table.integers(CONVOLUTION_3D_EXTERNAL, "q"))
    weight = _floats(geometry, _first(table.extent(Convolution.WEIGHT, 4), sections, 0))
    return LayerWeights(weight, _first(table.extent(Convolution.BIAS, 4), sections, 1))


def _inner_product(model: ModelBytes, table: Table) -> LayerWeights:
    geometry = Geometry(table.integer(InnerProduct.OUTPUTS))
    quantised = table.table(InnerProduct.QUANTISED)
    if quantised is None:
        weight = _floats(geometry, _first(table.extent(InnerProduct.WEIGHT, 4)))
    else:
        weight = _quantised(model, quantised, geometry, (), None)
    return LayerWeights(weight, _first(table.extent(InnerProduct.BIAS, 4)))


def _first(inside: Extent | None, sections: Sequence[Extent] = (), index: int = 0) -> Extent | None:
    """Return the data inside the model file, else that in the `.weight` file; an empty one counts as absent."""
    if inside is not None and inside.bytes:
        return inside
    if index < len(sections) and sections[index].bytes:
        return sections[index]
    return None


def _floats(geometry: Geometry, payload: Extent | None) -> WeightStorage | None:
    if payload is None:
        return None
    return WeightStorage("fp32", "float", geometry.shape(_count(payload, 4)), payload)


def _count(extent: Extent, size: int) -> int:
    if extent.bytes % size:
        raise ModelFileError(f"{extent.bytes} bytes are no whole number of {size}-byte weights")
    return extent.bytes // size


def _quantised(
    model: ModelBytes, table: Table, geometry: Geometry, sections: Sequence[Extent], int8: Table | None
) -> WeightStorage | None:
    encoding = table.integer(Quantised.ENCODING)
    payload = _first(table.extent(Quantised.BUFFER, 1), sections, 0)
    indices = _first(table.extent(Quantised.SPARSE_INDEX, 4), sections, 3)
    if indices is not None:
        values = _first(table.extent(Quantised.SCALES, 4), sections, 1)
        shape = geometry.shape(table.integer(Quantised.SPARSE_ELEMENTS, "I"))
        if values is None or values.bytes != indices.bytes or _count(indices, 4) > math.prod(shape):
            raise ModelFileError("a sparse weight has not one value per position")
        return WeightStorage("fp32", "sparse_float", shape, values, indices=indices)
    if payload is None:
        return None
    if encoding == Encoding.HALF:
        return WeightStorage("fp16", "half", geometry.shape(_count(payload, 2)), payload)
    common = partial(_integers, geometry=geometry, payload=payload, table=table, sections=sections, int8=int8)
    if encoding == Encoding.INT8:
        return common("int8", "int8", elements=payload.bytes)
    wide = table.flag(Quantised.WIDE_SHAPE)
    read = partial(model.read, payload)
    if encoding == Encoding.CODEBOOK:
        book = read_dense(read, payload.bytes, wide=wide)
        return common(f"int{book.indices.bits}", "codebook", elements=book.elements)
    if encoding == Encoding.SPARSE_CODEBOOK:
        book = read_sparse(read, payload.bytes, wide=wide)
        return common(f"int{book.indices.bits}", "sparse_codebook", elements=book.elements)
    raise ModelFileError(f"a weight is stored in an unknown way ({encoding})")


def _integers(
    kind: str,
    stored: Stored,
    geometry: Geometry,
    elements: int,
    payload: Extent,
    *,
    table: Table | None = None,
    sections: Sequence[Extent] = (),
    int8: Table | None = None,
) -> WeightStorage:
    """Return the storage of integer weights with the granularity that the number of scales implies."""
    shape = geometry.shape(elements)
    scales, scale_type, asymmetric = _scales(table, sections, int8, stored)
    if scales is None:
        raise ModelFileError(f"{kind} weights without scales")
    numbers = _count(scales, 2 if scale_type == "fp16" else 4)
    rows = numbers // 2 if asymmetric else numbers
    blocks = max(rows // shape[0], 1)
    if rows * (2 if asymmetric else 1) != numbers or (rows != 1 and rows % shape[0]) or shape[1] % blocks:
        raise ModelFileError(f"{numbers} scales do not divide over a weight of shape {list(shape)}")
    return WeightStorage(
        type=kind,
        stored=stored,
        shape=shape,
        payload=payload,
        scales=scales,
        scale_type=scale_type,
        rows=rows,
        symmetric=not asymmetric,
        block_size=shape[1] // blocks if blocks > 1 else None,
        activations_too=int8 is not None,
    )


def _scales(
    table: Table | None, sections: Sequence[Extent], int8: Table | None, stored: Stored
) -> tuple[Extent | None, Literal["fp32", "fp16"], bool]:
    """Return where the scales are, their type, and whether each comes with a minimum."""
    if int8 is not None:
        own = _first(int8.extent(Int8.SCALES, 4))
        if own is not None or table is None:
            return own, "fp32", False
    assert table is not None
    asymmetric = table.integer(Quantised.ASYMMETRIC) != 0 or is_oldest_form(table, stored)
    if table.integer(Quantised.SCALE_TYPE, "b"):
        return _first(table.extent(Quantised.HALF_SCALES, 2), sections, 1), "fp16", asymmetric
    return _first(table.extent(Quantised.SCALES, 4), sections, 1), "fp32", asymmetric


def is_oldest_form(table: Table, stored: Stored) -> bool:
    """Whether this is the first form of plain INT8, always asymmetric and without a multiplier."""
    return (
        stored == "int8"
        and table.integer(Quantised.MINIMUM) == 0
        and abs(table.real(Quantised.MULTIPLIER)) < _OLDEST_ASYMMETRIC
    )
