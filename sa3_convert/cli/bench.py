"""`bench`: how fast and in how much memory a bundle generates, engine by engine."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import BundleArgument, JsonFileOption, ThreadsOption
from sa3_convert.cli.paths import opens
from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from sa3_convert.lab.bench import Row


def bench(
    bundle: BundleArgument,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            help="mnn, mnn-low (weights quantised in memory), mnn-split (the DiT in two parts), onnxruntime, "
            "onnxruntime-int8 or torch; several times. All that the bundle has when not given.",
        ),
    ] = None,
    seconds: Annotated[str, typer.Option("--seconds", metavar="S,S,…", help="Durations.")] = "10,30,60,120",
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=1000, help="Warm generations of each.")] = 3,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Denoising steps; what suits the model when not given.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            metavar="DIR",
            help="For torch: the reference, decoding as published (chunks of 128 latents, 32 overlapping).",
            callback=opens,
        ),
    ] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Also measure peak memory.")] = True,
    json_file: JsonFileOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure generation on several engines, interleaved: cold, and the median of warm repeats."""
    durations = _durations(seconds)
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.cli.console import stderr, stdout
    from sa3_convert.lab.bench import bench as measure
    from sa3_convert.lab.bench import contenders
    from sa3_convert.system.files import write_text
    from sa3_convert.system.machine import machine

    found = contenders(bundle, tuple(engine or ()), checkpoint=checkpoint, threads=threads)
    described = machine()
    rows = measure(
        found,
        durations,
        repeats=repeats,
        steps=steps,
        memory=memory,
        report=lambda line: stderr.print(line, style="dim"),
    )
    manifest = Bundle.open(bundle).manifest
    if json_file is not None:
        data = {
            "schema": 1,
            "machine": described,
            "variant": manifest.label,
            "recipe": manifest.recipe,
            "repeats": repeats,
            "steps": steps,
            "engines": {c.name: {"engine": c.engine, **c.options} for c in found},
            "rows": [row.to_json() for row in rows],
        }
        write_text(json_file, json.dumps(data, indent=2) + "\n")
    stdout.print(table(rows, f"{bundle}: {manifest.label}, recipe {manifest.recipe}, median of {repeats}"))
    versions = ", ".join(f"{name} {described['versions'][name]}" for name in ("MNN", "onnxruntime", "torch"))
    echo(
        f"{described['processor']}, {described['usable_cores']} of {described['cores']} cores, "
        f"{' '.join(described['instructions'])}; load {described['load_average']} at the start; {versions}"
    )


def _durations(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or any(not math.isfinite(value) or value <= 0 for value in found):
        raise UsageError(f"--seconds {text!r} is no list of durations; write for example 10,30,60,120.")
    return found


def table(rows: "list[Row]", title: str) -> "Table":
    """Return the published table: seconds by component, speed and memory."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for name in ("audio", "engine", ""):
        made.add_column(name)
    for name in ("load", "T5", "NC", "DiT step", "DiT", "decoder", "other", "total", "× real time", "peak MiB"):
        made.add_column(name, justify="right")
    previous = None
    for row in rows:
        if previous is not None and previous != row.duration:
            made.add_section()
        previous = row.duration
        f = row.figures
        seconds = (f.load, f.text_encoder, f.number_conditioner, f.dit_step, f.dit, f.decoder, f.other, f.total)
        made.add_row(
            f"{row.duration:g} s",
            row.engine,
            row.temperature,
            *(f"{value:.3f}" for value in seconds),
            f"{row.real_time_factor:.2f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        )
    return made
