"""`run`: the one place that prints errors and decides the exit code of a command that lives to its end."""

import errno
import io
import os
import re
import signal
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import sa3_convert
from sa3_convert.cli import bundle, checkpoint
from sa3_convert.cli.bench import bench
from sa3_convert.cli.bisect import bisect
from sa3_convert.cli.convert import convert
from sa3_convert.cli.doctor import doctor
from sa3_convert.cli.drift import drift
from sa3_convert.cli.echo import echo
from sa3_convert.cli.inspect import inspect, table
from sa3_convert.cli.plan import plan
from sa3_convert.cli.run import run as generate
from sa3_convert.cli.stages import export, fuse, mnn
from sa3_convert.cli.verify import verify
from sa3_convert.errors import BackendError, Sa3Error, UsageError
from sa3_convert.system.log import show
from sa3_convert.system.streams import anything_unheard, release_standard_output
from sa3_convert.system.supervisor import received

INTERRUPTED = 130
BROKEN_PIPE = 141
"""What read standard output went away before everything was said; the work itself was done."""

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
for command in (convert, export, fuse, mnn, plan, verify, bisect, inspect, table, drift, bench, doctor):
    app.command()(command)
app.command("run")(generate)


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"sa3-convert {sa3_convert.__version__}")
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


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; never raises."""
    try:
        code = _run(arguments)
        return BROKEN_PIPE if code == 0 and anything_unheard() else code
    finally:
        release_standard_output()


def _run(arguments: list[str]) -> int:
    os.environ.pop("SA3_CONVERT_DEBUG", None)
    try:
        _require_text(arguments)
        result = app(arguments, standalone_mode=False, prog_name="sa3-convert")
    except KeyboardInterrupt:
        result = INTERRUPTED
    except (typer.Abort, typer.Exit) as leave:
        result = getattr(leave, "exit_code", 1)
    except Exception as error:  # the outermost frame: what reaches it and is not ours is a bug to be reported as one
        # A C extension may have made an error of its own of an interrupt.
        result = INTERRUPTED if received() else _failed(error)
    # Typer turns every interrupt into this result, without a word. What is to be said, `main` says.
    if result == INTERRUPTED:
        return 128 + (received() or signal.SIGINT)
    return result if isinstance(result, int) else 0


def _require_text(arguments: Sequence[str]) -> None:
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            # Neither JSON nor the libraries that load models take such names.
            shown = argument.encode(errors="backslashreplace").decode()
            raise UsageError(f"{shown} is not UTF-8. Rename the file or folder, or give the text as UTF-8.") from None


_OUT_OF_MEMORY = re.compile(r"(?i)(can't|cannot|failed to|unable to) allocate|bad.?alloc")
"""How native libraries say it: torch and ONNX Runtime have no exception type for it."""


def _failed(error: Exception) -> int:
    """Explain an error, and return its exit code."""
    if isinstance(error, Sa3Error):
        _complain(str(error), error)
        return error.exit_code
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):
        # Typer's own usage errors carry their message and exit code 2.
        shown = io.StringIO()
        error.show(file=shown) if hasattr(error, "show") else shown.write(f"sa3-convert: {error.format_message()}")
        echo(shown.getvalue().rstrip(), err=True)
        return int(error.exit_code)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        _complain("Out of memory. Convert fewer components at a time (--component), or on a larger machine.", error)
        return 4
    if isinstance(error, UnicodeEncodeError) and any("\ud800" <= letter <= "\udfff" for letter in error.object):
        name = error.object.encode(errors="backslashreplace").decode()
        _complain(f"{name} is not UTF-8. Rename the file or folder.", error)
        return 3
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    if isinstance(error, OSError):
        what = "The disk is full" if error.errno == errno.ENOSPC else "The system refused"
        _complain(f"{what}: {error}. Nothing half-written was left behind.", error)
        return 3
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] != sa3_convert.__name__:
        # Running a bundle needs less than everything else does, and may be all that was installed.
        _complain(
            f"A package that this needs cannot be imported ({error}). "
            f"Install what brings it: pip install 'sa3-convert[{_extra_with(error.name or '')}]'.",
            error,
        )
        return BackendError.exit_code
    _complain(
        f"This is a bug in sa3-convert: {type(error).__name__}: {error}\n"
        "Please report it with the output of the same command with --debug in front: sa3-convert --debug …",
        error,
    )
    return 70


def _extra_with(module: str) -> str:
    """Return which of our extras brings a package, by what the installed distribution says; `all` where it does not."""
    import importlib.metadata

    try:
        requirements = importlib.metadata.requires("sa3-convert") or ()
    except importlib.metadata.PackageNotFoundError:
        requirements = ()
    name = re.sub(r"[-_]", "[-_]", module.partition(".")[0]) or "(?!)"
    extra = re.compile(rf"(?i){name}(?![-_\w]).*extra == .(?P<name>\w+)")
    found = filter(None, map(extra.match, requirements))
    return next((match["name"] for match in found if match["name"] != "dev"), "all")


def _complain(message: str, error: BaseException | None = None) -> None:
    if error is not None and os.environ.get("SA3_CONVERT_DEBUG"):
        echo("".join(traceback.format_exception(error)).rstrip(), err=True)
    echo(f"sa3-convert: {message}", err=True)
