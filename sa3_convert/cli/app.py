"""`run`: the one place that prints errors and decides the exit code of a command that lives to its end."""

import contextlib
import io
import os
import re
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import sa3_convert
from sa3_convert.cli import bundle, checkpoint
from sa3_convert.cli.bench import bench
from sa3_convert.cli.bisect import bisect
from sa3_convert.cli.convert import convert
from sa3_convert.cli.doctor import doctor
from sa3_convert.cli.drift import drift
from sa3_convert.cli.echo import be_quiet, echo
from sa3_convert.cli.inspect import inspect, table
from sa3_convert.cli.options import Command
from sa3_convert.cli.plan import plan
from sa3_convert.cli.run import run as generate
from sa3_convert.cli.selftest import selftest
from sa3_convert.cli.serve import serve
from sa3_convert.cli.stages import export, fuse, mnn
from sa3_convert.cli.sweep import sweep
from sa3_convert.cli.verify import verify
from sa3_convert.errors import BackendError, Sa3Error, UsageError, told_by_system
from sa3_convert.system.log import show
from sa3_convert.system.streams import anything_unheard, release_standard_output
from sa3_convert.system.supervisor import received

INTERRUPTED = 130
BROKEN_PIPE = 141
"""What read standard output went away before everything was said; the work itself was done."""

_CONVERT, _STAGES, _CHECK, _MEASURE = "Convert and run", "Stage by stage", "Check", "Measure and choose"
_COMMANDS: dict[str, tuple[Callable[..., None], str, str]] = {
    "convert": (convert, _CONVERT, "artifacts/small-music --recipe int8 --out artifacts/bundle"),
    "run": (generate, _CONVERT, 'artifacts/bundle --prompt "warm analog pad" --seconds 10 -o pad.wav'),
    "serve": (serve, _CONVERT, "artifacts/int8 artifacts/fp16 -o pieces"),
    "verify": (verify, _CHECK, "artifacts/bundle --full --report report"),
    "bisect": (bisect, _CHECK, "artifacts/bundle --component dit"),
    "drift": (drift, _CHECK, "artifacts/bundle --baseline drift.json"),
    "doctor": (doctor, _CHECK, "--backend cpu --json"),
    "selftest": (selftest, _CHECK, "--device cuda --json selftest.json"),
    "inspect": (inspect, _CHECK, "artifacts/bundle/dit.mnn"),
    "bench": (bench, _MEASURE, "artifacts/bundle --engine mnn --seconds 10,30 --json bench.json"),
    "table": (table, _MEASURE, "artifacts/bundle artifacts/other --bench bench.json"),
    "plan": (plan, _MEASURE, "artifacts/small-music --component dit --target-mib 200 --out dit-200.yaml"),
    "sweep": (sweep, _MEASURE, "artifacts/small-music --component dit --sizes 200:440:30 --out sweep"),
    "export": (export, _STAGES, "artifacts/small-music --component dit --out dit.onnx"),
    "fuse": (fuse, _STAGES, "dit.onnx --component dit --out dit-fused.onnx"),
    "mnn": (mnn, _STAGES, "dit-fused.onnx --component dit --out dit.mnn"),
    "checkpoint fetch": (checkpoint.fetch, "", "stabilityai/stable-audio-3-small-music artifacts/small-music"),
    "checkpoint synthesize": (checkpoint.synthesize, "", "artifacts/toy --variant small-sfx --seed 1"),
    "checkpoint train-miniature": (checkpoint.train_miniature, "", "artifacts/training"),
    "bundle publish": (bundle.publish, "", "artifacts/bundle --to someone/sa3-mnn --private --dry-run"),
    "bundle export": (bundle.export, "", "artifacts/bundle --to site --layout hub"),
    "bundle card": (bundle.card, "", "artifacts/bundle --report report --bench bench.json -o README.md"),
}
"""What each command calls, its group in the help, and an example."""

app = typer.Typer(
    name="sa3-convert",
    help="Stable Audio 3 checkpoints to verified MNN models: convert, prove, run.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
_groups = {"": app}
for _name, _help in {"checkpoint": "Make or download checkpoints.", "bundle": "Hand bundles on."}.items():
    _groups[_name] = typer.Typer(help=_help, no_args_is_help=True)
    # A group stays one although it has one command.
    _groups[_name].callback()(lambda: None)
    app.add_typer(_groups[_name], name=_name, rich_help_panel=_CONVERT)
for _name, (_call, _panel, _example) in _COMMANDS.items():
    _group, _, _own = _name.rpartition(" ")
    _epilog = f"Example: sa3-convert {_name} {_example}"
    _groups[_group].command(_own, cls=Command, epilog=_epilog, rich_help_panel=_panel or None)(_call)


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"sa3-convert {sa3_convert.__version__}")
        raise typer.Exit


@app.callback(epilog="Example: sa3-convert convert artifacts/small-music --recipe int8 --out artifacts/bundle")
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show recipes, and what MNN and other libraries say.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on standard error but errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    if verbose and quiet:
        raise UsageError("--verbose and --quiet contradict each other; give one of them.")
    show(verbose)
    be_quiet(quiet)
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
    be_quiet(False)
    try:
        for argument in arguments:
            argument.encode()
        result = app(arguments, standalone_mode=False, prog_name="sa3-convert")
    except KeyboardInterrupt:
        result = INTERRUPTED
    except (typer.Abort, typer.Exit) as leave:
        result = getattr(leave, "exit_code", 1)
    except SystemExit as leave:
        # So Typer leaves with 1 where the reader of an output has gone away, and with 0 where a shell asks for words.
        result = BROKEN_PIPE if leave.code else 0
    except Exception as error:  # the outermost frame: what reaches it and is not ours is a bug to be reported as one
        # A C extension may have made an error of its own of an interrupt.
        result = INTERRUPTED if received() else _failed(error, arguments)
    # Typer turns every interrupt into this result, without a word. What is to be said, `main` says.
    if result == INTERRUPTED:
        return 128 + (received() or signal.SIGINT)
    return result if isinstance(result, int) else 0


_NEED_TORCH = ("convert", "export", "plan", "sweep", "drift")
"""Commands for which the first package that is missing is not the last; Dask's are asked for beside all others."""


def _failed(error: Exception, arguments: Sequence[str]) -> int:
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
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    if known := told_by_system(error):
        _complain(str(known), error)
        return known.exit_code
    if isinstance(error, UnicodeEncodeError) and any("\ud800" <= letter <= "\udfff" for letter in error.object):
        # Neither JSON nor the libraries that load models take such names.
        name = error.object.encode(errors="backslashreplace").decode()
        _complain(f"{name} is not UTF-8. Rename the file or folder, or give the text as UTF-8.", error)
        return 2 if error.object in arguments else 3
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] != sa3_convert.__name__:
        # Running a bundle needs less than everything else does, and may be all that was installed.
        command = next((word for word in arguments if not word.startswith("-")), "")
        extra = _extra_with(error.name or "")
        if command in _NEED_TORCH and extra != "cluster":
            extra = "convert"
        _complain(
            f"A package that this needs cannot be imported ({error}). Install what brings it: {_installs(extra)}.",
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


def _installs(extra: str) -> str:
    """Return the command that adds an extra, in the way in which the package was installed itself."""
    import importlib.metadata
    import json
    import shlex
    from urllib.parse import unquote, urlsplit

    wanted, editable = f"sa3-convert[{extra}]", ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        # Of what came from a folder, a file or a repository; of what came from an index there is none.
        origin = json.loads(importlib.metadata.distribution("sa3-convert").read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            wanted, editable = f"{unquote(urlsplit(origin['url']).path)}[{extra}]", "-e "
        elif "url" in origin:
            wanted = f"{wanted} @ {origin['url']}"
    return f"pip install {editable}{shlex.quote(wanted)}"


def _complain(message: str, error: BaseException | None = None) -> None:
    if error is not None and os.environ.get("SA3_CONVERT_DEBUG"):
        echo("".join(traceback.format_exception(error)).rstrip(), err=True)
    echo(f"sa3-convert: {message}", err=True)
