"""The command line: parse, call one function, map errors to exit codes."""

from sa3_convert.cli.app import main

__all__ = ["main"]
