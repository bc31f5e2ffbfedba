"""Lines on standard output and error; with `console`, the only way to a terminal."""

import shlex
import sys

from sa3_convert.system.untrusted import printable

_quiet = False


def be_quiet(wanted: bool) -> None:
    """Leave standard error to errors, or do so no longer."""
    global _quiet
    _quiet = wanted


def is_silent(stream: object) -> bool:
    """Whether nothing but errors goes there: standard error of a quiet command."""
    return _quiet and stream is sys.stderr


def echo(text: str, *, err: bool = False) -> None:
    """Print a line, what would control the terminal as text: names and messages come from files that others made."""
    stream = sys.stderr if err else sys.stdout
    # `--json` may have claimed standard output: then this is standard error. None is one that is not there.
    if stream is not None and (err or not is_silent(stream)):
        # Not by Typer, which writes UTF-8 where a stream's encoding is ASCII.
        stream.write(f"{printable(text)}\n")
        stream.flush()


def echo_next(*arguments: str) -> None:
    """Print the command that comes next, as a shell takes it."""
    echo(f"Next: {shlex.join(['sa3-convert', *arguments])}")
