"""Hold back what a native library prints on standard output or standard error, and read it.

MNN's C++ code writes its diagnostics to file descriptor 1, where they would mix with a user's `--json` or streamed
audio. They are also the only place where it says why something failed.
"""

import contextlib
import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

from sa3_convert.log import note

_STDOUT, _STDERR = 1, 2
_C = ctypes.CDLL(None)
_C_STDOUT = ctypes.c_void_p.in_dll(_C, "__stdoutp" if sys.platform == "darwin" else "stdout")


class CapturedText:
    """What was printed; complete once the block has ended."""

    def __init__(self) -> None:
        self.text = ""

    @property
    def lines(self) -> tuple[str, ...]:
        """The non-empty lines."""
        return tuple(line.strip() for line in self.text.splitlines() if line.strip())


class _Redirection:
    """One redirection of a descriptor for the whole process, shared by blocks that overlap in several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._users = 0
        self._saved = -1
        self._file: IO[bytes] | None = None

    def begin(self) -> int:
        """Redirect if nobody has yet; return where in the file this user's text begins."""
        with self._lock:
            _flush()
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the process
            if self._users == 0:
                self._saved = os.dup(self._descriptor)
                self._file.seek(0)
                self._file.truncate()
                os.dup2(self._file.fileno(), self._descriptor)
            self._users += 1
            return self._file.seek(0, os.SEEK_END)

    def end(self, start: int) -> str:
        """Put the descriptor back if this was the last user; return the text since `start`."""
        with self._lock:
            _flush()
            assert self._file is not None
            size = os.fstat(self._file.fileno()).st_size
            # Read at an offset: the descriptor shares this file's position.
            text = os.pread(self._file.fileno(), size - start, start).decode("utf-8", "replace")
            self._users -= 1
            if self._users == 0:
                os.dup2(self._saved, self._descriptor)
                os.close(self._saved)
            return text


_redirections = {descriptor: _Redirection(descriptor) for descriptor in (_STDOUT, _STDERR)}


def _flush() -> None:
    """Empty Python's and C's buffers, so that text goes where it belonged when it was written."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(ValueError):  # closed
                stream.flush()
    _C.fflush(_C_STDOUT)


def capture_stdout() -> contextlib.AbstractContextManager[CapturedText]:
    """Collect what is written to file descriptor 1 while the block runs, by whichever thread.

    Blocks may nest and overlap in threads; each then sees the others' text too. A caller that streams its own data to
    standard output from another thread duplicates the descriptor beforehand and writes to the duplicate.
    """
    return _captured(_STDOUT)


def capture_stderr() -> contextlib.AbstractContextManager[CapturedText]:
    """Collect what is written to file descriptor 2 while the block runs; see `capture_stdout`."""
    return _captured(_STDERR)


@contextlib.contextmanager
def _captured(descriptor: int) -> Iterator[CapturedText]:
    captured = CapturedText()
    try:
        os.fstat(descriptor)
    except OSError:  # a daemon without standard output: there is nothing to keep clean
        yield captured
        return
    start = _redirections[descriptor].begin()
    try:
        yield captured
    finally:
        captured.text = _redirections[descriptor].end(start)
        note("MNN", captured.lines)
