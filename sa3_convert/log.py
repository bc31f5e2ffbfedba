"""One log for what others say while they work: MNN, its converter, ONNX Runtime, torch, and Python's warnings.

Nothing of it belongs on a terminal that was asked for results, and all of it may be what explains one. A conversion
keeps it with the stage that it was said in; `--verbose` shows it on standard error, of stages that are reused, too.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Final

from sa3_convert.untrusted import printable

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
