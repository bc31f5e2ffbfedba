"""Hashes of what a result depends on, and files that carry the SHA-256 of their own content."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Final

from sa3_convert.system.files import atomic_path
from sa3_convert.system.untrusted import SMALL, read_bytes

_PACKAGE = Path(__file__).parents[1]


def fingerprint(**parts: Any) -> str:
    """Return the hex SHA-256 of JSON-ready parts."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def source_digest(room: str) -> str:
    """Return the hex SHA-256 of the source files in one of the package's folders, byte by byte."""
    digest = hashlib.sha256()
    for file in sorted((_PACKAGE / room).glob("**/*.py")):
        digest.update(file.relative_to(_PACKAGE).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


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
