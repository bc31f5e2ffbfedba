"""Lines on standard output and error; with `console`, the only way to a terminal."""

import typer

from sa3_convert.system.untrusted import printable


def echo(text: str, *, err: bool = False) -> None:
    """Print a line, what would control the terminal as text: names and messages come from files that others made."""
    typer.echo(printable(text), err=err)
