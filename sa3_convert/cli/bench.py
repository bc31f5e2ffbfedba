"""`bench`: how fast and in how much memory a bundle generates, engine by engine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import (
    BackendOption,
    BundleArgument,
    Device,
    JsonOption,
    OfflineOption,
    ThreadsOption,
    brought,
    hub_origin,
    is_duration,
    listed,
    write_figures,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from sa3_convert.bundle.table import Peer, PeerRow
    from sa3_convert.lab.bench import Row


PeerOption = Annotated[
    list[Path] | None,
    Option(
        metavar="FILE.json",
        help="Show another program's times beside ours, as the guide says; several.",
        callback=paths.reads,
    ),
]


def bench(
    bundle: BundleArgument,
    engine: Annotated[
        list[str] | None,
        Option(
            help="auto (what `run` takes, the default), mnn, mnn-low (weights quantised in memory), mnn-split (the DiT "
            "in parts), onnxruntime, onnxruntime-int8, onnxruntime-fp16 or torch, several times; or all of the bundle."
        ),
    ] = None,
    seconds: Annotated[str, Option(metavar="S,S,…", help="Durations.")] = "10,30,60,120",
    repeats: Annotated[int, Option(min=1, max=1000, help="Warm generations of each.")] = 3,
    steps: Annotated[int | None, Option(min=1, help="Denoising steps; what suits the model when not given.")] = None,
    checkpoint: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="For torch: the reference, decoding as published (chunks of 128 latents, 32 overlapping).",
            callback=paths.opens,
        ),
    ] = None,
    peak_memory: Annotated[bool, Option("--peak-memory/--no-peak-memory", help="Also measure peak memory.")] = True,
    measure_memory: Annotated[bool | None, Option("--memory/--no-memory", hidden=True)] = None,
    device: BackendOption = "cpu",
    peer: PeerOption = None,
    offline: OfflineOption = False,
    json_file: JsonOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure speed and memory of generation, engine by engine.

    Engines take turns; each is measured cold, and as the median of warm repeats.
    """
    durations = listed("--seconds", seconds, float, (10.0, 30.0, 60.0, 120.0), is_duration)
    from sa3_convert.bundle.table import Peer
    from sa3_convert.cli.console import open_told, stderr
    from sa3_convert.lab.bench import bench as measure
    from sa3_convert.lab.bench import contenders
    from sa3_convert.system.machine import machine

    peers = [Peer.read(path) for path in peer or ()]
    names, chosen = _engines(bundle := brought(bundle, offline), engine, device, checkpoint)
    found = contenders(bundle, names, checkpoint=checkpoint, threads=threads, backend=device)
    described = machine()
    rows = measure(
        found,
        durations,
        repeats=repeats,
        steps=steps,
        memory=peak_memory if measure_memory is None else measure_memory,
        report=lambda line: stderr.print(line, style="dim"),
    )
    manifest = open_told(bundle).manifest
    data = {"machine": described, "variant": manifest.label, "recipe": manifest.recipe, "repeats": repeats}
    data |= hub_origin(bundle) | {"steps": steps, "engines": {c.name: {"engine": c.engine, **c.options} for c in found}}
    data |= ({} if chosen is None else {"chosen": chosen}) | {"peers": [p.model_dump(mode="json") for p in peers]}
    data |= {"models": {a.component: a.content for a in manifest.artifacts if a.kind == "mnn"}}
    write_figures(json_file, data | {"rows": [row.to_json() for row in rows]})
    echo(f"{bundle}: {manifest.label}, recipe {manifest.recipe}; seconds, median of {repeats}")
    _print_tables(rows, peers, described)


def _engines(
    bundle: Path, asked: "Sequence[str] | None", device: Device, checkpoint: Path | None
) -> tuple[tuple[str, ...], str | None]:
    """Return the engines to measure, none for all, and why this one where it was chosen, which is told."""
    from sa3_convert.cli.generate import chosen_engine, tell_engine

    names = list(asked or ("auto", *(("torch",) if checkpoint is not None else ())))
    if "auto" not in names:
        return (() if names == ["all"] else tuple(names)), None
    name, why = chosen_engine(bundle, device, checkpoint=checkpoint is not None)
    if device == "cpu":
        tell_engine(name, device, why)
    names[names.index("auto")] = name
    return tuple(names), why


def _print_tables(rows: "Sequence[Row]", peers: "Sequence[Peer]", described: "Mapping[str, Any]") -> None:
    """Print a table for each duration, then the machine, and those of peers."""
    from sa3_convert.cli.console import stdout

    for duration in dict.fromkeys(row.duration for row in rows):
        of_peers = [(p.name, row) for p in peers for row in p.rows if row.duration == duration]
        ours = [row for row in rows if row.duration == duration]
        stdout.print(bench_table(ours, f"{duration:g} s of audio", of_peers))
    load = "unknown" if described["load_average"] is None else f"{described['load_average']:.1f}"
    versions = ", ".join(f"{name} {described['versions'][name]}" for name in ("MNN", "onnxruntime", "torch"))
    echo(
        f"{described['processor']}, {described['usable_cores']} of {described['cores']} cores, "
        f"{' '.join(described['instructions'])}; load {load} at the start; {versions}"
    )
    for one in peers:
        echo(f"{one.name}: {one.machine}")


def bench_table(rows: "Sequence[Row]", title: str, peers: "Sequence[tuple[str, PeerRow]]" = ()) -> "Table":
    """Return seconds by component, speed and memory, within 80 columns; what is no component's own is `other`.

    What was measured of other programs comes last.
    """
    from sa3_convert.cli.console import grid

    on_device = any(row.device_bytes is not None for row in rows)
    figures = ("load", "T5", "step", "DiT", "decoder", "other", "total", "×time", "MiB", *("VRAM",) * on_device)
    made = grid(title, ("engine", ""), figures)
    made.padding = 0
    for row in rows:
        f = row.figures
        seconds = (f.load, f.text_encoder, f.dit_step, f.dit, f.decoder, f.other + f.number_conditioner, f.total)
        sizes = (row.peak_bytes, *(row.device_bytes,) * on_device)
        peaks = ("" if size is None else f"{size / 2**20:.0f}" for size in sizes)
        speed = f"{row.real_time_factor:.2f}"
        made.add_row(row.engine, row.temperature, *(shown_seconds(value) for value in seconds), speed, *peaks)
    for name, p in peers:
        told = (p.load, p.text_encoder, p.dit_step, p.dit, p.decoder, p.other, p.seconds)
        peak = "" if p.peak_bytes is None else f"{p.peak_bytes / 2**20:.0f}"
        made.add_row(name, "peer", *(shown_seconds(value) for value in told), f"{p.duration / p.seconds:.2f}", peak)
    return made


def shown_seconds(value: float | None) -> str:
    """Return a time with three digits that matter, and no more than milliseconds; nothing of one that nobody told."""
    return "" if value is None else f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"
