"""One log for what others say while they work: Python's warnings, and what native libraries print past Python."""

import atexit
import contextlib
import logging
import mmap
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import IO, Final

from sa3_convert.system.streams import flush_native
from sa3_convert.system.untrusted import printable

LOG: Final = logging.getLogger("sa3_convert")
LOG.setLevel(logging.DEBUG)
LOG.propagate = False
LOG.addHandler(logging.NullHandler())

_MOST_LINES: Final = 2000


def note(source: str, lines: Iterable[str]) -> None:
    """Log what `source` said."""
    for line in lines:
        LOG.debug("%s: %s", source, line)


def show(verbose: bool) -> None:
    """Take in all loggers and warnings of this process, and print the log on standard error or stop doing so."""
    for handler in [h for h in LOG.handlers if isinstance(h, _OnTerminal)]:
        LOG.removeHandler(handler)
    if verbose:
        LOG.addHandler(_OnTerminal())
    root = logging.getLogger()
    if not any(isinstance(handler, _Forward) for handler in root.handlers):
        root.addHandler(_Forward())
    logging.captureWarnings(True)


def is_shown() -> bool:
    """Whether the log is printed: what prints by itself may then do so."""
    return any(isinstance(handler, _OnTerminal) for handler in LOG.handlers)


@contextlib.contextmanager
def kept() -> Iterator[list[str]]:
    """Collect what is logged while the block runs; of very much, the beginning."""
    handler = _Keep()
    LOG.addHandler(handler)
    try:
        yield handler.lines
    finally:
        LOG.removeHandler(handler)


@contextlib.contextmanager
def taken_in(name: str) -> Iterator[None]:
    """Send Python's warnings and a logger's records to the log, and nowhere else, while the block runs."""
    logger, forward = logging.getLogger(name), _Forward()
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [forward], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = lambda message, category, *_, **__: note(category.__name__, [str(message)])
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate


class _OnTerminal(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints on what is standard error now."""

    def format(self, record: logging.LogRecord) -> str:
        # Names in a model may hold what a terminal obeys.
        return printable(record.getMessage())


class _Forward(logging.Handler):
    """Takes what other loggers say into the log."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.name, record.getMessage().splitlines())


class _Keep(logging.Handler):
    """Collects lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.lines) < _MOST_LINES:
            self.lines.append(record.getMessage())


_STDOUT, _STDERR = 1, 2


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
                import tempfile

                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the process
                atexit.register(self._file.close)
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
            text = ""
            if size > start:
                # Without moving this file's position, which the descriptor shares.
                with mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ) as written:
                    text = written[start:size].decode("utf-8", "replace")
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
    flush_native()


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
