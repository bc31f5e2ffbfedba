"""A model's bytes, the `.mnn` and the `.weight` beside it, and a reader of FlatBuffers that trusts nothing in them."""

import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

from sa3_convert.errors import ModelFileError
from sa3_convert.system.checked_files import named
from sa3_convert.system.untrusted import NotAFileError, open_regular

DECODED_LIMIT: Final = 16 << 20
"""Bytes of structure, names and dimensions that may be decoded; a model of 10,000 operators needs about two million."""
_TABLE_COST: Final = 32
_VTABLE_LIMIT: Final = 1 << 10
_NAME_LIMIT: Final = 1 << 16

_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
_I32: Final = struct.Struct("<i")
_SCALARS: Final = {code: struct.Struct(f"<{code}") for code in "?bBhHiIqQfd"}


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes that holds data: in the model file, or in the `.weight` file beside it."""

    offset: int
    bytes: int
    external: bool = False


class Buffer:
    """The bytes of a FlatBuffer and what may still be decoded of them."""

    __slots__ = ("_data", "_left", "_size")

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._left = DECODED_LIMIT

    def root(self) -> "Table":
        """Return the root table."""
        return self.table_at(self.pointer(0))

    def spend(self, cost: int) -> None:
        """Take `cost` bytes from what may be decoded."""
        self._left -= cost
        if self._left < 0:
            raise ModelFileError(f"its structure is larger than {DECODED_LIMIT >> 20} MiB")

    def check(self, start: int, size: int) -> None:
        """Refuse a range that is not inside the buffer."""
        if start < 0 or size < 0 or start + size > self._size:
            raise ModelFileError(f"it refers to bytes {start} to {start + size}, but has {self._size}")

    def unpack(self, form: struct.Struct, position: int) -> int | float | bool:
        """Return the scalar at a position."""
        if position < 0 or position + form.size > self._size:
            self.check(position, form.size)
        value: int | float | bool = form.unpack_from(self._data, position)[0]
        return value

    def pointer(self, position: int) -> int:
        """Follow the unsigned offset at a position."""
        return position + int(self.unpack(_U32, position))

    def table_at(self, position: int) -> "Table":
        """Return the table at a position, its vtable checked."""
        self.spend(_TABLE_COST)
        vtable = position - int(self.unpack(_I32, position))
        vtable_size = int(self.unpack(_U16, vtable))
        table_size = int(self.unpack(_U16, vtable + 2)) if vtable_size >= 4 else 0
        if not 4 <= vtable_size <= _VTABLE_LIMIT or vtable_size % 2 or table_size < 4:
            raise ModelFileError(f"what should be a table at byte {position} is none")
        self.check(vtable, vtable_size)
        self.check(position, table_size)
        fields = struct.unpack_from(f"<{vtable_size // 2 - 2}H", self._data, vtable + 4)
        return Table(self, position, table_size, fields)

    def vector(self, position: int, item_size: int) -> tuple[int, int]:
        """Return start and length of the vector whose offset stands at `position`."""
        start = self.pointer(position)
        length = int(self.unpack(_U32, start))
        self.check(start + 4, length * item_size)
        return start + 4, length

    def slice(self, start: int, size: int) -> bytes:
        """Return a copy of a small range."""
        self.spend(size)
        self.check(start, size)
        return self._data[start : start + size]


class Table:
    """One table; fields are asked for by their number in the schema."""

    __slots__ = ("_buffer", "_fields", "_position", "_size")

    def __init__(self, buffer: Buffer, position: int, size: int, fields: tuple[int, ...]) -> None:
        self._buffer = buffer
        self._position = position
        self._size = size
        self._fields = fields

    def _field(self, number: int, size: int) -> int | None:
        """Return where a field stands, or None if it is absent."""
        offset = self._fields[number] if number < len(self._fields) else 0
        if offset == 0:
            return None
        if offset < 4 or offset + size > self._size:
            raise ModelFileError(f"field {number} of the table at byte {self._position} lies outside it")
        return self._position + offset

    def _scalar(self, number: int, code: str, default: int | float) -> int | float | bool:
        form = _SCALARS[code]
        position = self._field(number, form.size)
        return default if position is None else self._buffer.unpack(form, position)

    def integer(self, number: int, code: str = "i", default: int = 0) -> int:
        """Return an integer field; `code` is its `struct` code."""
        return int(self._scalar(number, code, default))

    def real(self, number: int, default: float = 0.0) -> float:
        """Return a float32 field."""
        return float(self._scalar(number, "f", default))

    def flag(self, number: int) -> bool:
        """Return a boolean field that is false by default."""
        return bool(self._scalar(number, "B", 0))

    def table(self, number: int) -> "Table | None":
        """Return the table that a field points to."""
        position = self._field(number, 4)
        return None if position is None else self._buffer.table_at(self._buffer.pointer(position))

    def tables(self, number: int) -> "Iterator[Table]":
        """Yield the tables of a vector of tables; none if it is absent."""
        for position in self._pointers(number):
            yield self._buffer.table_at(self._buffer.pointer(position))

    def has(self, number: int) -> bool:
        """Whether a field that holds an offset is present."""
        return self._field(number, 4) is not None

    def extent(self, number: int, item_size: int) -> Extent | None:
        """Return where a vector's items are, without reading them."""
        position = self._field(number, 4)
        if position is None:
            return None
        start, length = self._buffer.vector(position, item_size)
        return Extent(start, length * item_size)

    def integers(self, number: int, code: str = "i") -> tuple[int, ...]:
        """Return a vector of integers; empty if it is absent."""
        position = self._field(number, 4)
        if position is None:
            return ()
        size = _SCALARS[code].size
        start, length = self._buffer.vector(position, size)
        return struct.unpack(f"<{length}{code}", self._buffer.slice(start, length * size))

    def string(self, number: int) -> str | None:
        """Return a string; bytes that are not UTF-8 are replaced."""
        extent = self.extent(number, 1)
        return None if extent is None else self._text(extent.offset, extent.bytes)

    def strings(self, number: int) -> tuple[str, ...]:
        """Return a vector of strings; empty if it is absent."""
        found = []
        for position in self._pointers(number):
            found.append(self._text(*self._buffer.vector(position, 1)))
        return tuple(found)

    def _pointers(self, number: int) -> range:
        position = self._field(number, 4)
        if position is None:
            return range(0)
        start, length = self._buffer.vector(position, 4)
        self._buffer.spend(4 * length)
        return range(start, start + 4 * length, 4)

    def _text(self, start: int, size: int) -> str:
        if size > _NAME_LIMIT:
            raise ModelFileError(f"a name at byte {start} has {size} bytes")
        self._buffer.spend(_TABLE_COST)
        text = self._buffer.slice(start, size + 1)
        if text[-1]:
            raise ModelFileError(f"a name at byte {start} does not end")
        return text[:-1].decode("utf-8", errors="replace")


_SMALLEST: Final = 12
WEIGHTS: Final = ".weight"
"""Behind a model's name: the file beside it that has its weights, where it is too large for one."""


def weight_path(model: Path) -> Path:
    """Return where MNN keeps the weights of a model that is too large for one file."""
    return model.with_name(model.name + WEIGHTS)


def unusable(path: Path, fault: ModelFileError) -> ModelFileError:
    """Return the error for the user: which file, what is wrong with it, what to do."""
    return ModelFileError(f"{path} cannot be used as an MNN model: {fault}. Convert it or fetch it again.")


class ModelBytes:
    """An open model file. Reads what it is asked for and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._external: BinaryIO | None = None
        self.external_size = 0

    def __enter__(self) -> Self:
        with open_model(self.path) as stream:
            self.size = stream.seek(0, 2)
            if self.size < _SMALLEST:
                raise ModelFileError(f"it has only {self.size} bytes")
            if self.size % 4:
                raise ModelFileError(f"it was cut off or added to: {self.size} bytes are no whole number of words")
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.buffer = Buffer(self._map)
        return self

    def __exit__(self, *_: object) -> None:
        if self._map is not None:
            self._map.close()
        if self._external is not None:
            self._external.close()

    def sections(self, numbers: Sequence[int]) -> tuple[Extent, ...]:
        """Return the consecutive parts of the `.weight` file that [offset, bytes, bytes, …] names."""
        if not numbers:
            return ()
        self._open_external()
        offset, *sizes = numbers
        found = []
        for size in sizes:
            if offset < 0 or size < 0 or offset + size > self.external_size:
                raise ModelFileError(
                    f"it keeps weights in bytes {offset} to {offset + size} of {weight_path(self.path).name}, "
                    f"which has {self.external_size}"
                )
            found.append(Extent(offset, size, external=True))
            offset += size
        return tuple(found)

    def read(self, extent: Extent, start: int = 0, size: int | None = None) -> bytes:
        """Return a copy of (part of) an extent."""
        size = extent.bytes - start if size is None else size
        if start < 0 or size < 0 or start + size > extent.bytes:
            raise ModelFileError("a weight ends before its own description does")
        position = extent.offset + start
        if not extent.external:
            assert self._map is not None
            return self._map[position : position + size]
        stream = self._open_external()
        stream.seek(position)
        data = stream.read(size)
        if len(data) != size:
            raise ModelFileError(f"{weight_path(self.path).name} became shorter while it was read")
        return data

    def _open_external(self) -> BinaryIO:
        if self._external is None:
            self._external = open_model(weight_path(self.path))
            self.external_size = self._external.seek(0, 2)
        return self._external


def open_model(path: Path) -> BinaryIO:
    """Open a file for reading; a directory, a pipe or a device is refused before it can block."""
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise ModelFileError(f"{named(path)} does not exist") from None
    except NotAFileError:
        raise ModelFileError(f"{named(path)} is not a file") from None
    except OSError as error:
        raise ModelFileError(f"{named(path)} cannot be opened: {error.strerror}") from None
