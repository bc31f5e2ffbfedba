"""Make equal conversions equal bytes.

The converter writes a random UUID into every file; nothing else differs between two conversions of the same input. It
is replaced by one that is made from the content. The file is a FlatBuffer
(https://flatbuffers.dev/internals): the root table is at the offset that stands first, its vtable at the signed
distance that stands first in the table; field 11 of MNN's `Net` is `mnn_uuid` (schema/default/MNN.fbs).
"""

import hashlib
import mmap
import struct
import uuid
from pathlib import Path

from sa3_convert.errors import ConversionError

_UUID_FIELD = 11
_UUID_LENGTH = 36
_NO_UUID = b"0" * _UUID_LENGTH
_CHUNK = 1 << 22


def set_content_uuid(path: Path) -> uuid.UUID:
    """Replace a `.mnn` file's random UUID, in place, by one made from the rest of its bytes, and return it.

    Raises:
        ConversionError: the file has no UUID where MNN 3 writes it.

    """
    with path.open("r+b") as stream:
        try:
            with mmap.mmap(stream.fileno(), 0) as data:
                start = _find_uuid(data)
                data[start : start + _UUID_LENGTH] = _NO_UUID
                identity = uuid.UUID(bytes=_digest(data)[:16], version=5)
                data[start : start + _UUID_LENGTH] = str(identity).encode()
                data.flush()
        except (ValueError, struct.error) as error:
            raise ConversionError(
                f"{path.name} has no UUID where the format keeps it ({error}): the converter's file is damaged, or "
                "this version of MNN writes another format."
            ) from None
    return identity


def _find_uuid(data: mmap.mmap) -> int:
    (table,) = struct.unpack_from("<I", data, 0)
    (to_vtable,) = struct.unpack_from("<i", data, table)
    vtable = table - to_vtable
    (vtable_size,) = struct.unpack_from("<H", data, vtable)
    slot = 4 + 2 * _UUID_FIELD
    if vtable_size < slot + 2:
        raise ValueError("the field is absent")
    (offset,) = struct.unpack_from("<H", data, vtable + slot)
    field = table + offset
    text = field + struct.unpack_from("<I", data, field)[0]
    (length,) = struct.unpack_from("<I", data, text)
    uuid.UUID(data[text + 4 : text + 4 + length].decode("ascii"))
    if length != _UUID_LENGTH:
        raise ValueError(f"it is {length} characters long")
    return int(text) + 4


def _digest(data: mmap.mmap) -> bytes:
    digest = hashlib.sha256()
    with memoryview(data) as view:
        for start in range(0, len(view), _CHUNK):
            with view[start : start + _CHUNK] as piece:
                digest.update(piece)
    return digest.digest()
