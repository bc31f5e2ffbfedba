"""Make equal conversions equal bytes.

The converter writes a random UUID into every file; nothing else differs between two conversions of the same input. It
is replaced by one that is made from the content.
"""

import uuid
from pathlib import Path

from sa3_convert.errors import ConversionError, ModelFileError
from sa3_convert.mnn.file.storage import content_digest, read_storage

_UUID_LENGTH = 36


def set_content_uuid(path: Path) -> uuid.UUID:
    """Replace a `.mnn` file's random UUID, in place, by one made from all other bytes, and return it.

    Raises:
        ConversionError: the file has no UUID where MNN 3 writes it, or is damaged.

    """
    try:
        extent = read_storage(path).identity
        identity = uuid.UUID(bytes=bytes.fromhex(content_digest(path))[:16], version=5)
    except ModelFileError as fault:
        raise ConversionError(f"MNN's converter left a damaged file: {fault}") from None
    if extent is None or extent.bytes != _UUID_LENGTH:
        raise ConversionError(f"{path.name} has no UUID: this version of MNN writes another format than 3.6.")
    with path.open("r+b") as stream:
        stream.seek(extent.offset)
        stream.write(str(identity).encode())
    return identity
