"""What a result depends on, as one hash: redo exactly what has changed, by content and not by time."""

import hashlib
import importlib.metadata
import json
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent


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


@cache
def version_of(distribution: str) -> str:
    """Return the installed version of a distribution, without importing it; 'absent' when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
