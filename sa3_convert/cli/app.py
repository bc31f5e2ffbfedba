"""`main`: the one place that prints errors and decides the exit code."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import sa3_convert
from sa3_convert.cli import (
    benching,
    bundle,
    checkpoint,
    conversion,
    doctoring,
    drifting,
    generation,
    judgement,
    planning,
)
from sa3_convert.errors import BackendError, Sa3Error
from sa3_convert.log import show

INTERRUPTED = 130

app = typer.Typer(
    name="sa3-convert",
    help="Stable Audio 3 checkpoints to verified MNN models: convert, prove, run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(bundle.app, name="bundle")
for room in (conversion, planning, judgement, drifting, generation, benching, doctoring):
    room.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sa3-convert {sa3_convert.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what MNN, its converter and other libraries say.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    show(verbose)
    if debug:
        os.environ["SA3_CONVERT_DEBUG"] = "1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    code = run(list(sys.argv[1:] if arguments is None else arguments))
    if code == INTERRUPTED:
        # An interrupt that strikes inside Python code which a C extension runs marks the interpreter for good: at its
        # end it would die of the signal instead of leaving with this code. Everything is cleaned up by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; never raises."""
    os.environ.pop("SA3_CONVERT_DEBUG", None)
    try:
        result = app(arguments, standalone_mode=False, prog_name="sa3-convert")
    except Sa3Error as error:
        _complain(str(error), error)
        return error.exit_code
    except KeyboardInterrupt:
        result = INTERRUPTED
    except (typer.Abort, typer.Exit) as leave:
        return getattr(leave, "exit_code", 1)
    except Exception as error:  # the outermost frame: anything else that reaches it is a bug to be reported as one
        return _failed(error)
    if result == INTERRUPTED:
        # Typer turns an interrupt into this result, without a word.
        _complain("Interrupted; nothing half-written was left behind.")
    return result if isinstance(result, int) else 0


_OUT_OF_MEMORY = re.compile(r"(?i)(can't|cannot|failed to|unable to) allocate|bad.?alloc")
"""How native libraries say it: torch and ONNX Runtime have no exception type for it."""


def _failed(error: Exception) -> int:
    """Explain an error that is not one of ours, and return its exit code."""
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):
        # Typer's own usage errors carry their message and exit code 2.
        error.show() if hasattr(error, "show") else _complain(error.format_message())
        return int(error.exit_code)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        _complain("Out of memory. Convert fewer components at a time (--component), or on a larger machine.", error)
        return 4
    if isinstance(error, OSError):
        what = "The disk is full" if error.errno == errno.ENOSPC else "The system refused"
        _complain(f"{what}: {error}. Nothing half-written was left behind.", error)
        return 3
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] != sa3_convert.__name__:
        # Running a bundle needs less than everything else does, and may be all that was installed.
        _complain(
            f"A package that this needs cannot be imported ({error}). "
            "Install what converting and judging take: pip install 'sa3-convert[convert]'.",
            error,
        )
        return BackendError.exit_code
    _complain(
        f"This is a bug in sa3-convert: {type(error).__name__}: {error}\n"
        "Please report it with the output of the same command with --debug in front: sa3-convert --debug …",
        error,
    )
    return 70


def _complain(message: str, error: BaseException | None = None) -> None:
    if error is not None and os.environ.get("SA3_CONVERT_DEBUG"):
        traceback.print_exception(error)
    typer.echo(f"sa3-convert: {message}", err=True)
