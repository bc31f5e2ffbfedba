"""Outputs that are no regular files: standard output, pipes and devices, which are written to and never replaced."""

import codecs
import contextlib
import errno
import io
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, TextIO

STANDARD_OUTPUT: Final = Path("-")
"""The name that stands for standard output wherever a file is written."""

_OUT, _ERR = 1, 2
_OPEN_FILES = re.compile(r"(?:/proc/(\d+)(?:/task/\d+)?|/dev)/fd")
"""Where Linux, and where macOS, names open files."""
_MOST_LINKS = 40
_SPELLED = {
    **{"×": "x", "·": "*", "±": "+-", "√": "sqrt ", "²": "^2", "³": "^3", "⁴": "^4", "π": "pi", "∞": "infinity"},
    **{"…": "...", "→": "->", "−": "-", "–": "-", "▶": ">", "“": '"', "”": '"'},
}
"""Signs that are printed, for terminals that lack them."""
_SPELLING: Final = "sa3_convert.spelled"

_claimed: tuple[int, TextIO] | None = None
"""Standard output itself, and Python's object for it, while descriptor 1 leads to standard error."""


def is_stream(path: Path) -> bool:
    """Tell whether a path is standard output, a pipe or a device, or a name of an open file of a process."""
    if _open_file(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def descriptor_of(path: Path) -> int | None:
    """Return the open descriptor of this process that a path names, as `-`, `/dev/stdout` and `/dev/fd/3` do."""
    found = _open_file(path)
    return found[1] if found is not None and found[0] == os.getpid() else None


def is_terminal(path: Path) -> bool:
    """Tell whether what is written to a path would be shown to somebody."""
    descriptor = descriptor_of(path)
    return descriptor is not None and os.isatty(_really(descriptor))


def check_stream(path: Path) -> None:
    """Check, before any long work, that something can be written to a stream.

    Raises:
        OSError: it was opened for reading alone, or was closed when the process began.

    """
    descriptor = descriptor_of(path)
    if descriptor is not None:
        try:
            os.write(_really(descriptor), b"")
        except OSError as error:
            if error.errno == errno.EBADF:
                raise OSError(errno.EBADF, "It is closed, or open for reading alone", str(path)) from None
            raise


def identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of what a path leads to; None if there is nothing, or what is written there is lost."""
    descriptor = descriptor_of(path)
    try:
        found = path.stat() if descriptor is None else os.fstat(_really(descriptor))
    except OSError:
        return None
    return None if stat.S_ISCHR(found.st_mode) else (found.st_dev, found.st_ino)


@contextlib.contextmanager
def opened_stream(path: Path) -> Iterator[BinaryIO]:
    """Open a stream for writing, as it is: nothing is truncated, and what was written before stays.

    Raises:
        OSError: it cannot be opened, or what reads it is gone.

    """
    descriptor = descriptor_of(path)
    if descriptor is None:
        stream: BinaryIO = path.open("wb")
    else:
        if descriptor == _OUT and sys.stdout is not None:
            sys.stdout.flush()
        stream = os.fdopen(os.dup(_really(descriptor)), "wb")
    with stream:
        yield stream


def claim_standard_output() -> None:
    """Keep standard output for what is written to `-`: from now on all that is printed goes to standard error."""
    global _claimed
    if _claimed is None:
        sys.stdout.flush()
        _claimed = os.dup(_OUT), sys.stdout
        os.dup2(_ERR, _OUT)
        sys.stdout = sys.stderr


def release_standard_output() -> None:
    """Undo `claim_standard_output`."""
    global _claimed
    if _claimed is not None:
        flush_native()
        descriptor, sys.stdout = _claimed
        os.dup2(descriptor, _OUT)
        os.close(descriptor)
        _claimed = None


def prepare_standard_streams() -> None:
    """Make standard input, output and error safe to use, whatever they were when the process began.

    A closed one is filled, so that no file that is opened later becomes it; written to, standard output then is an
    error where it was asked for (`-`) and nothing elsewhere. One whose reader goes away loses what is printed, and the
    work goes on. What cannot be encoded is spelled in ASCII, or escaped.
    """
    for descriptor in (0, _OUT, _ERR):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        # The lowest free one, which this is.
        os.open(os.devnull, os.O_RDONLY)
    sys.stdout = _Patient.over(sys.stdout, _OUT)
    sys.stderr = _Patient.over(sys.stderr, _ERR)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for the letters that an encoding lacks, and where to go on; see `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    text = "".join(_SPELLED.get(sign, sign.encode("ascii", "backslashreplace").decode()) for sign in missing)
    return text, error.end


codecs.register_error(_SPELLING, _spelled)


def anything_unheard() -> bool:
    """Tell whether what reads standard output went away before everything was printed."""
    stream = sys.stdout if _claimed is None else _claimed[1]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.flush()
    return isinstance(stream, _Patient) and stream.broken


class _Patient(io.TextIOWrapper):
    """Text for a descriptor that drops everything once nobody reads it any more; any other fault is told once.

    An interrupt must not strike between the system's write and what remembers it, or a line is printed twice: that is
    why there is no Python code below `io.BufferedWriter`.
    """

    broken = False

    @classmethod
    def over(cls, stream: TextIO | None, descriptor: int) -> TextIO:
        """Return what takes the place of Python's own standard stream; None is one that was closed."""
        if stream is None:
            return Path(os.devnull).open("w", encoding="utf-8")
        stream.flush()
        # A console of Windows is none of the files that `io.FileIO` writes to.
        raw: io.RawIOBase = os.fdopen(descriptor, "wb", buffering=0, closefd=False)
        return cls(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=_SPELLING,
            line_buffering=True,
            write_through=getattr(stream, "write_through", False),
        )

    def write(self, text: str, /) -> int:
        with self._patience():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._patience():
            super().flush()

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            told, self.broken = self.broken, True
            # What is still in the buffer goes there, too.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not told and not isinstance(error, BrokenPipeError):
                raise


def flush_native() -> None:
    """Write what native libraries have printed, which still lies in C's buffer of standard output."""
    import ctypes

    if sys.platform == "win32":
        ctypes.CDLL("ucrtbase").fflush(None)
        return
    library = ctypes.CDLL(None)
    # All of C's streams would include those that are read.
    library.fflush(ctypes.c_void_p.in_dll(library, "__stdoutp" if sys.platform == "darwin" else "stdout"))


def _open_file(path: Path) -> tuple[int, int] | None:
    """Return process and descriptor if a path is a name of an open file."""
    if path == STANDARD_OUTPUT:
        return os.getpid(), _OUT
    # Such a name is found by its way there: where it ends stands a file like any other.
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(path.parent)
        found = _OPEN_FILES.fullmatch(folder)
        if found and path.name.isdigit():
            return int(found[1] or os.getpid()), int(path.name)
        path = Path(folder, path.name)
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return None


def _really(descriptor: int) -> int:
    return _claimed[0] if descriptor == _OUT and _claimed is not None else descriptor
