"""`serve`: the page and the HTTP interface."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from sa3_convert.cli import options as o
from sa3_convert.cli import paths
from sa3_convert.cli.run import USUAL, engine_options, own_settings
from sa3_convert.errors import UsageError
from sa3_convert.serve import LOCAL

if TYPE_CHECKING:
    from sa3_convert.runtime.engines import EngineName
    from sa3_convert.serve.worker import Served

_safety = o.panel("Who may ask")

EnginesOption = Annotated[
    list[str] | None,
    o.runtime(
        metavar="NAME",
        help="auto (as `run`), mnn, onnxruntime, onnxruntime-int8 or onnxruntime-fp16; several to compare them.",
    ),
]
AdaptersOption = Annotated[
    list[Path] | None,
    Option(
        "--adapter",
        metavar="FILE",
        help="A LoRA that requests may apply, by the file's name without its ending (several times); needs "
        "`convert --adapter-slots`.",
        callback=paths.reads,
    ),
]


def serve(
    bundles: o.BundlesArgument,
    output: Annotated[
        Path,
        Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Where audio, settings and uploads are kept.",
            callback=paths.makes,
        ),
    ] = Path("served"),
    port: Annotated[int, Option(min=0, max=65535, help="0 is any that is free.")] = 7860,
    host: Annotated[
        str, _safety(metavar="ADDRESS", help="Whom to listen to; another than this machine needs --token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        _safety(
            metavar="TOKEN|@FILE", envvar="SA3_CONVERT_TOKEN", help="What whoever asks has to know.", show_envvar=True
        ),
    ] = None,
    queue: Annotated[
        int, Option(min=1, max=10000, help="Generations that may wait; then it is said when to come back.")
    ] = 32,
    keep_mib: Annotated[
        int | None,
        Option(
            min=1,
            help="Memory beyond which bundles not in use are freed; three quarters of what is free by default.",
        ),
    ] = None,
    engine: EnginesOption = None,
    adapters: AdaptersOption = None,
    backend: o.BackendOption = "cpu",
    memory: o.MemoryOption = "normal",
    precision: o.PrecisionOption = "high",
    threads: o.ThreadsOption = None,
    offline: o.OfflineOption = False,
) -> None:
    """Open a page and an HTTP interface.

    Nothing is asked of the network, and only this machine is listened to.
    """
    token = _read_token(token)
    if host not in LOCAL and not token:
        raise UsageError(f"--host {host} lets others ask; give --token, or SA3_CONVERT_TOKEN in the environment.")
    from sa3_convert.cli.console import stderr
    from sa3_convert.serve.server import serve as run

    how = {"backend": backend, "memory": memory, "precision": precision, "threads": threads}
    from sa3_convert.serve.adapters import named

    served = _served(bundles, _engines(engine or ["auto"]), how, offline, named(adapters or ()))
    run(served, output, host=host, port=port, token=token, queue=queue, keep_mib=keep_mib, say=stderr.print)


def _served(
    bundles: list[Path], engines: list[str], how: Mapping[str, Any], offline: bool, adapters: Mapping[str, Path]
) -> dict[str, "Served"]:
    """Return every bundle under every engine, by the name that clients see."""
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.cli.console import open_told
    from sa3_convert.runtime.engines import kinds_of
    from sa3_convert.serve.adapters import fitting, require_taken
    from sa3_convert.serve.worker import Served

    served: dict[str, Served] = {}
    problems: list[str] = []
    for bundle in bundles:
        chosen = _chosen(bundle, how, offline, bool(adapters)) if "auto" in engines else None
        names: list[EngineName] = [chosen[0] if chosen and one == "auto" else one for one in engines]  # type: ignore[misc]
        names = list(dict.fromkeys(names))
        folder = o.brought(bundle, offline, set().union(*(kinds_of(one, adapters=bool(adapters)) for one in names)))
        open_told(folder)
        for one in names:
            name = _name(folder, one if len(engines) > 1 else None, served)
            why = chosen[1] if chosen and one == chosen[0] else None
            own, left = fitting(Bundle.open(folder), one, adapters)
            served[name] = Served(folder.absolute(), one, _options(one, names, how), why, own)
            problems += left
    require_taken(adapters, served.values(), problems)
    return served


def _chosen(bundle: Path, how: Mapping[str, Any], offline: bool, adapters: bool) -> tuple["EngineName", str]:
    """Return the engine that `run` would take, and why; it is told."""
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.cli.generate import chosen_engine, tell_engine
    from sa3_convert.runtime.engines import takers

    # Its manifest says what there is; models are downloaded when it is known which.
    folder = o.brought(bundle, offline, {"tokenizer"})
    # A bundle without slots may stand beside one with them.
    adapters = adapters and bool(takers(Bundle.open(folder)))
    name, why = chosen_engine(folder, how["backend"], own_settings(how), adapters=adapters)
    if how["backend"] == "cpu":
        tell_engine(name, "cpu", why)
    return name, why


def _options(engine: "EngineName", engines: list["EngineName"], how: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an engine is opened with: beside others, without what only they have."""
    from sa3_convert.runtime.engines import ENGINE_OPTIONS

    theirs = {name for one in engines for name in ENGINE_OPTIONS[one]} - {*ENGINE_OPTIONS[engine]}
    own = {name: value for name, value in how.items() if name not in theirs}
    return engine_options({**USUAL, "lora": None, "checkpoint": None, **own, "engine": engine})


def _engines(names: list[str]) -> list[str]:
    from sa3_convert.runtime.engines import KINDS

    known = ["auto", *KINDS]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"There is no engine {unknown[0]!r} to serve with. There are: {', '.join(known)}.")
    return list(dict.fromkeys(names))


def _read_token(given: str | None) -> str | None:
    if given is None or not given.startswith("@"):
        return given
    from sa3_convert.system.untrusted import read_text

    try:
        return read_text(Path(given[1:])).strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"--token {given} cannot be read: {error}.") from None


def _name(folder: Path, engine: str | None, taken: Any) -> str:
    name = folder.resolve().name + (f" ({engine})" if engine else "")
    return name if name not in taken else next(n for k in range(2, 1000) if (n := f"{name} {k}") not in taken)
