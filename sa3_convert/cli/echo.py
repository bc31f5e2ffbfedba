"""Lines on standard output and error; with `console`, the only way to a terminal."""

import sys

import typer

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
    # What standard output takes goes to standard error where `--json` has claimed it.
    if err or not is_silent(sys.stdout):
        typer.echo(printable(text), err=err)
