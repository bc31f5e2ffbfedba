"""Ways into the bytes of a FlatBuffer, unchecked, for tests that forge them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def follow(data: bytes | bytearray, position: int) -> int:
    """Return where the offset at a position points to."""
    return position + int.from_bytes(data[position : position + 4], "little")


def field_position(data: bytes | bytearray, table: int, field: int) -> int:
    """Return where a field of a table stands."""
    vtable = table - int.from_bytes(data[table : table + 4], "little", signed=True)
    slot = vtable + 4 + 2 * field
    return table + int.from_bytes(data[slot : slot + 2], "little")


def vector_item(data: bytes | bytearray, table: int, field: int, index: int) -> int:
    """Return where an item of a field's vector of offsets stands."""
    return follow(data, field_position(data, table, field)) + 4 + 4 * index


@contextlib.contextmanager
def file_of(path: Path) -> Iterator[bytearray]:
    """Yield a file's bytes and write them back."""
    data = bytearray(path.read_bytes())
    yield data
    path.write_bytes(data)
