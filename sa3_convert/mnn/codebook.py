"""The layout of integer weights in a `.mnn`: a shape, the integers that occur, and indices into those, packed.

Dense (`Encoding.CODEBOOK`): rank u8; that many dimensions, u16 or u32; number of values u8 (0 = 256); the values, int8;
then per weight an index of ⌈log2(number of values)⌉ bits, most significant bit first, without padding in between.
Sparse (`Encoding.SPARSE_CODEBOOK`): shape; number of entries u32; bits per step u8; packed steps from one entry to the
next; number of values and values; packed indices. What is not named stands for 0. (MNN's `IDSTEncoder.hpp`.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sa3_convert.errors import ModelFileError

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
    """Parse the head of a dense buffer of `size` bytes.

    Raises:
        ModelFileError: the head and the size of the buffer do not fit together.

    """
    elements, position = _shape(read, wide=wide)
    values, position = _values(read, position)
    book = Codebook(elements, values, Packed(position, elements, _index_bits(values)))
    return _checked(book, size)


def read_sparse(read: Read, size: int, *, wide: bool) -> Codebook:
    """Parse the head of a sparse buffer of `size` bytes.

    Raises:
        ModelFileError: the head and the size of the buffer do not fit together.

    """
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
