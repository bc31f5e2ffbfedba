"""What this program keeps for itself between runs: content and its SHA-256 in one file, believed whole or not at all.

A measurement whose digits were damaged on disk is still a measurement to whoever parses it. The seal covers the file's
name as well, in which the callers put what the content belongs to, so that no file stands for another one.
"""

import hashlib
from pathlib import Path
from typing import Final

from sa3_convert.files import atomic_path
from sa3_convert.untrusted import SMALL, read_bytes

_MARK: Final = b"\n# sha256 "
_LENGTH: Final = len(_MARK) + 64 + 1


def write_sealed(path: Path, content: bytes) -> None:
    """Write content so that a reader sees the old file or the whole new one, and sees later damage."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content + _seal(path, content))


def read_sealed(path: Path, limit: int = SMALL) -> bytes:
    """Return content that `write_sealed` wrote under this name, untouched since.

    Args:
        path: of the file.
        limit: bytes that it may have.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
        ValueError: it was damaged, renamed, or written by something else.

    """
    data = read_bytes(path, limit + _LENGTH)
    content, seal = data[:-_LENGTH], data[-_LENGTH:]
    if seal != _seal(path, content):
        raise ValueError(f"{path} is not what was written there")
    return content


def _seal(path: Path, content: bytes) -> bytes:
    digest = hashlib.sha256(path.name.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(content)
    return _MARK + digest.hexdigest().encode() + b"\n"
