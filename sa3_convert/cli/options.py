"""The options that several commands share, and what they open and write; each command's own are with it."""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from typer import Argument, Option
from typer.core import TyperCommand

from sa3_convert.cli import paths
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.mnn.compatibility import MnnVersion
from sa3_convert.system.streams import STANDARD_OUTPUT, is_stream

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint
    from sa3_convert.recipe import Recipe
    from sa3_convert.scheduling import Runner

_T = TypeVar("_T")

Device = Literal["cpu", "cuda", "opencl", "vulkan"]
Level = Literal["normal", "high", "low"]
CASE = "'prompt=P seed=S seconds=D'"
DEFAULT_RECIPE = Path("configs/int8.yaml")


def panel(title: str) -> Callable[..., Any]:
    """Return what describes options of one group in the help."""
    return partial(Option, rich_help_panel=title)


runtime = panel("How the models run")

CheckpointArgument = Annotated[
    str, Argument(metavar="CHECKPOINT", help="Folder, or a hub id that was fetched before.", callback=paths.opens)
]
BundleArgument = Annotated[
    Path,
    Argument(
        metavar="BUNDLE",
        parser=paths.path,
        help="Folder that `convert` made, or ORG/NAME/FOLDER@REVISION of the hub.",
        callback=paths.opens,
    ),
]
BundlesArgument = Annotated[
    list[Path],
    Argument(
        metavar="BUNDLE…",
        parser=paths.path,
        help="Folders, or ids of the hub, as BUNDLE elsewhere.",
        callback=paths.opens,
    ),
]
OfflineOption = Annotated[
    bool, Option("--offline", help="Of the hub, take what was downloaded before, and use no network.")
]
LoraOption = Annotated[
    list[str] | None,
    Option(
        metavar="FILE[:STRENGTH]",
        help="LoRA (.safetensors) to merge into the weights; 1 is its full strength. Several are applied in order.",
        callback=paths.reads,
    ),
]
RecipeOption = Annotated[
    Path,
    Option(
        metavar="FILE", help="How to store each component: a file, or the name of one of ours.", callback=paths.reads
    ),
]
TargetOption = Annotated[
    MnnVersion | None, Option(help="Oldest MNN to be right on; the oldest that reads the recipe's types.")
]
ComponentOption = Annotated[
    list[Component] | None, Option(metavar="NAME", help=f"Only this one, several times: {', '.join(Component)}.")
]
OneComponentOption = Annotated[Component, Option(metavar="NAME", help=f"One of {', '.join(Component)}.")]
JsonOption = Annotated[
    Path | None,
    Option(
        "--json",
        metavar="[FILE]",
        help="Also write the figures as JSON; - or no FILE is standard output, and tables go to standard error.",
        callback=paths.writes,
    ),
]
ThreadsOption = Annotated[int | None, runtime(min=1, max=256, help="All cores when not given.")]
BackendOption = Annotated[
    Device, runtime("--backend", "--device", help="`run` takes the CPU where `doctor` found MNN wrong.")
]
MemoryOption = Annotated[Level, runtime(help="MNN: low keeps weights quantised in memory.")]
PrecisionOption = Annotated[
    Level,
    runtime(
        help="high computes in float32; normal multiplies in halves with torch and on GPUs; low, of MNN, computes in "
        "halves on ARM what is right with them."
    ),
]
_workers = panel("On several processes or machines")

WorkersOption = Annotated[
    int | None, _workers(min=1, max=256, help="Run on so many processes of this machine; needs the extra `cluster`.")
]
SchedulerOption = Annotated[
    str | None,
    _workers(
        metavar="ADDRESS",
        help="Run on a Dask scheduler's workers, tcp://HOST:8786; they see the same folders.",
    ),
]
ReferencesOption = Annotated[
    Path | None, Option(metavar="DIR", help="Where reference outputs are kept; beside the bundle by default.")
]


class Command(TyperCommand):
    """A command of which `--json` may come without its file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with `-` for a file that is not there: at the end, before an option, or where an argument would lack.

        The last is how `inspect --json FILE.mnn` is read.
        """
        options = args[: args.index("--")] if "--" in args else args
        if "--json" in options:
            after = options.index("--json") + 1
            value = args[after : after + 1]
            if not value or (value != ["-"] and value[0].startswith("-")) or self._lacks_argument(ctx, args):
                args = [*args[:after], str(STANDARD_OUTPUT), *args[after:]]
        return super().parse_args(ctx, args)

    def _lacks_argument(self, ctx: Any, args: list[str]) -> bool:
        given = self.make_parser(ctx).parse_args(list(args))[0]
        return any(p.required and not given.get(p.name) for p in self.params if p.param_type_name == "argument")


def open_recipe(recipe: Path) -> "Recipe":
    """Read the recipe that the user named, by path or by the name of one of ours."""
    from sa3_convert.recipe import load_recipe, recipe_file

    return load_recipe(recipe_file(recipe))


def cache_of(cache: Path | None, out: Path) -> Path:
    """Return where stages are kept: where the user said, or beside what is made."""
    from sa3_convert.convert.cache import cache_beside

    return cache or cache_beside(out)


def open_checkpoint(checkpoint: str, loras: list[str] | None) -> "Checkpoint":
    """Open what the user named, with its LoRAs; what these change is told on stderr."""
    from sa3_convert.checkpoint.lora_file import LoraRequest
    from sa3_convert.checkpoint.reader import Checkpoint, resolve_checkpoint

    requests = [LoraRequest.parse(text) for text in loras or ()]
    opened = Checkpoint.open(resolve_checkpoint(checkpoint)).with_loras(requests)
    if opened.loras:
        from sa3_convert.cli.console import lora_table, stderr

        for lora in opened.loras:
            stderr.print(lora_table(lora))
    return opened


def brought(bundle: Path, offline: bool, kinds: Collection[str] | None = None) -> Path:
    """Return a bundle's folder; of one that is named by its id on the hub, what is downloaded of these kinds."""
    from sa3_convert.hub.files import HubId

    if HubId.meant_by(bundle) is None:
        return bundle
    from sa3_convert.bundle.hub import bring_bundle
    from sa3_convert.cli.console import stderr, transfer

    with transfer("downloading") as progress:
        return bring_bundle(bundle, kinds, offline=offline, progress=progress, note=stderr.print)


def hub_origin(bundle: Path) -> dict[str, str]:
    """Return what JSON tells of a bundle that came from the hub: its id, with the commit."""
    from sa3_convert.hub.files import HubId

    found = HubId.of_snapshot(bundle)
    return {} if found is None else {"hub": str(found)}


def runner_on(workers: int | None, scheduler: str | None) -> "Runner | None":
    """Return what runs tasks on workers that it starts, or on those of a scheduler; None is in this process.

    Raises:
        UsageError: both kinds of workers are asked for.
        ImportError: Dask is not there; known before the first long step.

    """
    if workers and scheduler:
        raise UsageError("--workers starts workers here, --scheduler takes those of a scheduler. Give one of them.")
    if workers is None and scheduler is None:
        return None
    from sa3_convert import scheduling as s
    from sa3_convert.cli.echo import echo

    tell = partial(echo, err=True)
    return partial(s.on_dask, s.scheduler(scheduler, tell) if scheduler else s.local_workers(workers or 1, tell))


def write_figures(file: Path | None, data: Mapping[str, Any]) -> None:
    """Write what `--json` asks for, if it does: every command's figures have a schema number."""
    if file is not None:
        from sa3_convert.system.files import write_text

        # What a terminal obeys is escaped where one may listen, and half a character, which is no UTF-8, everywhere.
        text = json.dumps({"schema": 1, **data}, indent=2, ensure_ascii=is_stream(file))
        write_text(file, text.encode(errors="backslashreplace").decode() + "\n")


def listed(
    option: str, text: str | None, kind: Callable[[str], _T], default: Sequence[_T], fits: Callable[[_T], bool]
) -> tuple[_T, ...]:
    """Return what an option lists, separated by commas and each once."""
    if text is None:
        return tuple(default)
    try:
        found = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(fits(value) for value in found):
        example = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in default)
        raise UsageError(f"{option} {text!r} is no list of such numbers; write for example {example}.")
    return found


def is_duration(seconds: float) -> bool:
    """Whether there can be so much audio."""
    return math.isfinite(seconds) and seconds > 0
