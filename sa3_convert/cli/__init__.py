"""The command line: parse, call one function, map errors to exit codes."""

import contextlib
import sys
from collections.abc import Sequence

from sa3_convert.system.streams import prepare_standard_streams
from sa3_convert.system.supervisor import interrupted_early, leave, supervise


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, in a process that this one watches over, and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> int:
        from sa3_convert.cli.app import run

        return run(given)

    try:
        prepare_standard_streams()
        ended = supervise(command, debug=given[:1] == ["--debug"])
    except KeyboardInterrupt:
        ended = interrupted_early()
    if ended.complaint is not None:
        from sa3_convert.system.untrusted import printable

        with contextlib.suppress(OSError, AttributeError):  # the terminal has hung up
            sys.stderr.write(f"sa3-convert: {printable(ended.complaint)}\n")
    leave(ended.code)


__all__ = ["main"]
