"""What comes from outside is hostile until checked: bounded files, strict JSON and YAML, text for a terminal."""

import errno
import json
import math
import os
import re
import stat
import sys
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, NoReturn

from sa3_convert.errors import UsageError

SMALL: Final = 16 << 20
"""Bytes that a text file may have which a person or a tool wrote; the largest of ours has a tenth of it."""

_WINDOWS = sys.platform == "win32"
_RESERVED = re.compile(
    r"(?i)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³])( *\..*)?|.*[<>:\"|?*].*|.*[. ]", re.DOTALL
)
_DEEPEST = 64
_LARGEST = 1 << 64
_NON_BLOCKING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


class NotAFileError(OSError):
    """A folder, a pipe or a device stands where a file was expected, or the file is larger than it can be."""


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, or a link to one.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device.

    """
    # Opening a pipe would wait for its other end.
    descriptor = os.open(path, os.O_RDONLY | _NON_BLOCKING | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotAFileError(errno.EINVAL, "It is not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, limit: int = SMALL) -> bytes:
    """Read a whole regular file.

    Raises:
        OSError: it cannot be read, is no regular file, or has more than `limit` bytes.

    """
    with open_regular(path) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise NotAFileError(errno.EFBIG, f"It has more than {limit} bytes", str(path))
    return data


def read_text(path: Path, limit: int = SMALL) -> str:
    """Read a whole file of UTF-8 text; a byte-order mark is left out.

    Raises:
        OSError: see `read_bytes`.
        ValueError: it is not UTF-8.

    """
    return read_bytes(path, limit).decode("utf-8-sig")


def parse_json(text: str) -> Any:
    """Parse JSON whose values can be used without a second thought.

    Raises:
        ValueError: it is not JSON; it is nested more than 64 deep; an object names a key twice; a number is not finite
            or beyond 64 bits; a text holds NUL or half of a surrogate pair, which no path and no terminal takes.

    """
    try:
        value = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            else:
                _check_scalar(item)
        if not below:
            return value
        level = below
    raise ValueError("it is nested too deep")


def read_json(path: Path, limit: int = SMALL) -> Any:
    """Read a JSON file; see `read_text` and `parse_json` for what is refused."""
    return parse_json(read_text(path, limit))


def check_name(path: Path) -> None:
    """Refuse, on Windows, a name that stands for something else there: `CON` for a device, `a:b` for a part of `a`.

    Raises:
        UsageError: it does.

    """
    for name in path.parts[bool(path.anchor) :] if _WINDOWS else ():
        if name != ".." and _RESERVED.fullmatch(name):
            raise UsageError(f"{path}: Windows gives no file or folder the name {name!r}. Choose another.")


def printable(text: str) -> str:
    r"""Return text that a terminal shows as it is: what would control it is escaped (`\x1b`), line breaks stay."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it names {name!r} twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check_scalar(value: Any) -> None:
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("a text holds NUL or half of a surrogate pair")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
    elif isinstance(value, int) and not -_LARGEST < value < _LARGEST:
        raise ValueError("a whole number has more than 64 bits")
