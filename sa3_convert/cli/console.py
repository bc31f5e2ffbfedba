"""What the commands print while they work and when they are done: progress on stderr, results on stdout."""

import contextlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.control import Control
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import ControlType, Segment
from rich.table import Table

from sa3_convert.bundle.manifest import UNVERIFIED, Manifest
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.results import Verdict
from sa3_convert.cli.echo import is_silent
from sa3_convert.components import Component
from sa3_convert.convert.conversion import StageEvent
from sa3_convert.convert.plan import ComponentPlan, ConversionPlan, ConvertRequest, bytes_needed, total
from sa3_convert.convert.stages import STAGES, STAGES_OF
from sa3_convert.scheduling import Estimate
from sa3_convert.system.log import is_shown
from sa3_convert.system.untrusted import printable

if TYPE_CHECKING:
    from sa3_convert.checkpoint.lora import Lora
    from sa3_convert.lab.planner.planner import BitPlan
    from sa3_convert.lab.sweep.points import Point
    from sa3_convert.lab.sweep.result import Measured, Sweep
    from sa3_convert.lab.sweep.tasks import Task
    from sa3_convert.runtime.engines import Engine

_PIPED_WIDTH = 140
"""Columns for tables that go to a file or a log, where nothing says how wide it is."""
_EVERY = 10.0
"""Seconds between lines about work that is going on, where no bar can be shown."""


class EscapingConsole(Console):
    """Shows as text what would control the terminal: only rich itself controls it, with segments of that kind."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield what is written to the terminal."""
        for segment in super().render(renderable, options):
            plain = segment.control or segment.text.isprintable() or segment.text == "\n"
            yield segment if plain else Segment(printable(segment.text), segment.style)

    @property
    def quiet(self) -> bool:
        """Whether nothing is shown: where only errors go."""
        return is_silent(self.file)

    @quiet.setter
    def quiet(self, _: bool) -> None: ...


# Names, paths and regular expressions have brackets that are no markup.
stdout = EscapingConsole(highlight=False, markup=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
stderr = EscapingConsole(stderr=True, highlight=False, markup=False, soft_wrap=True)


def open_told(path: Path) -> Bundle:
    """Open a bundle; of one that came without a manifest it is told that nothing in it was verified."""
    bundle = Bundle.open(path)
    tell_unverified(bundle.manifest, path)
    return bundle


def tell_unverified(manifest: Manifest | None, path: Path) -> None:
    """Say of models without a manifest that nobody has held them to anything."""
    if manifest is not None and manifest.is_foreign:
        files = ", ".join(artifact.path for artifact in manifest.artifacts)
        stderr.print(f"{UNVERIFIED}: {path} has no manifest. Its dimensions are read from its files: {files}")


def show_stage(event: StageEvent) -> None:
    """Print a line when a stage begins, which on a terminal its result replaces, and one when it is done."""
    name = f"{event.component.value:<18}"
    if event.state in ("started", "working"):
        left = f", {timedelta(seconds=round(event.seconds))} left" if event.seconds >= 1 else ""
        doing = f"{name} {' '.join(filter(None, (STAGES[event.stage].verb, event.detail)))}{left} …"
        if stderr.is_terminal:
            stderr.print(f"{doing:<64}", Control(ControlType.CARRIAGE_RETURN), end="")
        else:
            stderr.print(doing)
        return
    time = "unchanged" if event.state == "reused" else f"{event.seconds:.1f} s"
    stderr.print(f"{name} {event.stage:<9} {time:>10}  {event.detail:<24}")


def show_verdict(verdict: Verdict) -> None:
    """Print one line per verified model."""
    stderr.print(f"{verdict.component.value:<18} {verdict.engine:<16} {verdict.worst.signal_to_noise_db:z.1f} dB")


def show_raised(engine: "Engine") -> None:
    """Say which models run at another precision than was asked for."""
    if raised := getattr(engine, "raised", ()):
        names = ", ".join(component.value for component in raised)
        stderr.print(f"Precision low is for what was found right in half arithmetic; at normal instead: {names}.")


def grid(title: str, left: Sequence[str], numbers: Sequence[str] = (), more: Sequence[str] = ()) -> Table:
    """Return a table that spends its width on what it says: columns of text, of numbers, and of text again."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name in (*left, *numbers, *more):
        table.add_column(name, overflow="fold", justify="right" if name in numbers else "left")
    return table


def lora_table(lora: "Lora") -> RenderableType:
    """Return what a LoRA is and how many layers it changes; in a verbose command which, `*` standing for numbers."""
    file = lora.file
    title = f"{file.path.name}: {file.type_name}, rank {file.rank}, alpha {file.alpha:g}, strength {lora.strength:g}"
    left_out = len(file.layers) - len(lora.layers)
    if not is_shown():
        return f"{title}; changes {len(lora.layers)} layers" + (f", leaves out {left_out}" if left_out else "")
    table = grid(title, ("layers that it changes",), ("count",))
    kinds = Counter(re.sub(r"\.\d+(?=\.)", ".*", layer) for layer in lora.layers.values())
    for kind, count in sorted(kinds.items()):
        table.add_row(kind, str(count))
    table.add_section()
    table.add_row("total", str(len(lora.layers)))
    if left_out:
        table.add_row("left out by its own filters", str(left_out))
    return table


def bundle_table(bundle: Bundle) -> Table:
    """Return the closing table of a conversion: what was made, how big, how close, and its hash."""
    title = f"{bundle.path}: {bundle.manifest.label}, recipe {bundle.manifest.recipe}"
    table = grid(title, ("component", "stored"), ("MiB", "dB", "floor", "cosine", "at low"), ("MNN", "SHA-256"))
    rows = bundle_rows(bundle)
    for row in rows:
        floor, mnn = row["floor_db"], row["target_mnn"]
        table.add_row(
            row["component"],
            row["precision"],
            f"{row['bytes'] / 2**20:.2f}",
            f"{row['signal_to_noise_db']:.1f}",
            "" if floor is None else f"{floor:g}",
            f"{row['cosine']:.5f}",
            "" if row["half_db"] is None else f"{row['half_db']:.1f}",
            f"{mnn}+" if mnn else "",
            row["sha256"][:12],
        )
    table.add_section()
    table.add_row("total", "", f"{sum(row['bytes'] for row in rows) / 2**20:.2f}")
    return table


def bundle_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """Return the figures of each model of a bundle that was verified."""
    return [
        {
            "component": artifact.component.value,
            "precision": artifact.precision,
            "bytes": artifact.total_bytes,
            "signal_to_noise_db": artifact.fidelity.signal_to_noise_db,
            "floor_db": artifact.floor_db,
            "cosine": artifact.fidelity.cosine,
            "half_db": artifact.half_db,
            "lowest_precision": artifact.lowest_precision,
            "target_mnn": artifact.target_mnn,
            "sha256": artifact.sha256,
        }
        for artifact in bundle.manifest.artifacts
        if artifact.kind == "mnn" and artifact.fidelity is not None and artifact.component is not None
    ]


def plan_table(request: ConvertRequest, plan: ConversionPlan) -> Table:
    """Return what a conversion would do, with sizes estimated from the tensors' shapes."""
    numbers = ("reference MiB", "model MiB", "memory GiB", "about")
    table = grid(f"Plan for {request.out} (nothing was done)", ("component", "stored"), numbers, ("to do",))
    for step in plan.steps:
        precision = request.recipe.for_component(step.component).precision
        sizes = (f"{size / 2**20:.2f}" for size in (step.reference_bytes, step.model_bytes))
        table.add_row(step.component.value, precision, *sizes, *_taken(step.takes), _to_do(step) or "up to date")
    if plan.existing is not None and not plan.up_to_date:
        table.add_row("bundle", "", "", "", "", "", "; ".join(_bundle_to_do(plan)))
    table.add_section()
    table.add_row(
        "total",
        "",
        f"{sum(step.reference_bytes for step in plan.steps) / 2**20:.2f}",
        f"{sum(step.model_bytes for step in plan.steps) / 2**20:.2f}",
        *_taken(total(step.takes for step in plan.steps)),
        f"{bytes_needed(plan.steps) / 2**20:.0f} MiB of disk",
    )
    return table


def plan_data(request: ConvertRequest, plan: ConversionPlan) -> dict[str, Any]:
    """Return what `plan_table` shows."""
    rows = [
        {
            "component": step.component.value,
            "precision": request.recipe.for_component(step.component).precision,
            "reference_bytes": step.reference_bytes,
            "model_bytes": step.model_bytes,
            "memory_bytes": step.takes.memory_bytes,
            "seconds": step.takes.seconds,
            "to_do": list(step.todo),
        }
        for step in plan.steps
    ]
    return {"components": rows, "up_to_date": plan.up_to_date, "disk_bytes": bytes_needed(plan.steps)}


def _to_do(step: ComponentPlan) -> str:
    """Return the stages that run, and the files that are put in place from what earlier runs left."""
    ready = [kind for kind in step.place if not set(STAGES_OF[kind]) & set(step.todo)]
    return " → ".join((*step.todo, *([f"place {', '.join(ready)}"] if ready else [])))


def _bundle_to_do(plan: ConversionPlan) -> Iterator[str]:
    """Yield what changes in a bundle besides its components' files."""
    if plan.shared:
        yield f"write {', '.join(plan.shared)}"
    if plan.dropped:
        yield f"leave out {', '.join(_dropped(plan))}"
    yield "write the manifest"


def show_dropped(plan: ConversionPlan) -> None:
    """Say what a bundle had and will not have."""
    if plan.dropped:
        stderr.print(f"Left out of the bundle from now on: {', '.join(_dropped(plan))}.")


def _dropped(plan: ConversionPlan) -> list[str]:
    return [f"{a.kind} of {a.component.value}" if a.component else a.kind for a in plan.dropped]


def _taken(takes: Estimate) -> tuple[str, str]:
    """Return memory and time for a table; nothing for what is done."""
    if not takes.seconds:
        return "", ""
    minutes, seconds = divmod(round(takes.seconds), 60)
    return f"{takes.memory_bytes / 2**30:.1f}", f"{minutes} min" if minutes > 2 else f"{60 * minutes + seconds} s"


def planned_table(component: Component, plan: "BitPlan") -> Table:
    """Return how many layers a plan stores at each precision, and which layers it keeps highest."""
    title = f"{component.value}: {plan.size / 2**20:.2f} MiB"
    table = grid(title, ("bits", "block"), ("layers", "MiB", "share of the error"), ("for example",))
    for row in planned_rows(plan):
        table.add_row(
            "fp16" if row["bits"] == 16 else str(row["bits"]),
            str(row["block_size"] or "channel"),
            str(len(row["layers"])),
            f"{row['bytes'] / 2**20:.2f}",
            f"{row['error_share']:.0%}",
            ", ".join(row["layers"][:2]) + (", …" if len(row["layers"]) > 2 else ""),
        )
    return table


def planned_rows(plan: "BitPlan") -> list[dict[str, Any]]:
    """Return the layers of each precision, the highest first."""
    groups: dict[tuple[int, int], list[str]] = {}
    for pattern, option in plan.allocation.chosen.items():
        groups.setdefault((option.bits or 16, option.block_size or 0), []).append(pattern)
    return [
        {
            "bits": bits,
            "block_size": block,
            "layers": [layer for pattern in patterns for layer in plan.layers[pattern]],
            "bytes": sum(plan.allocation.chosen[pattern].size for pattern in patterns),
            "error_share": sum(plan.allocation.chosen[p].error for p in patterns) / max(plan.allocation.error, 1e-30),
        }
        for (bits, block), patterns in sorted(groups.items(), reverse=True)
    ]


def sweep_table(sweep: "Sweep") -> Table:
    """Return the points of a sweep, and which of them are worth keeping."""
    whole = (*("in generations", "spectra dB (nudged)") * sweep.generated, *("recognised",) * sweep.recognises)
    figures = ("MiB", "worst dB", "predicted", *whole)
    table = grid(f"{sweep.checkpoint}, {sweep.variant}", ("point",), figures, ("recipe",))
    for point in sweep.points:
        known = point.bytes is not None and point.fidelity is not None
        table.add_row(
            point.name,
            f"{point.bytes / 2**20:.2f}" if point.bytes is not None else "missing",
            f"{point.fidelity.signal_to_noise_db:.1f}" if point.fidelity is not None else "",
            "" if point.predicted_db is None else f"{point.predicted_db:.1f}",
            *_in_generations(point)[: len(whole)],
            (point.recipe or "beaten by another") if known else "",
        )
    return table


def _in_generations(point: "Measured") -> tuple[str, str, str]:
    found = point.generations
    if found is None:
        return "", "", ""
    spectra = f"{found.spectra_db:.2f} ({found.chaos_db:.2f})"
    return f"{found.worst_db:.1f}", spectra, "" if found.recognised is None else f"{found.recognised}"


def sweep_plan_table(points: "Sequence[Point]", tasks: "Mapping[str, Sequence[Task]]", cache: Path) -> Table:
    """Return what each point of a sweep takes."""
    table = grid("Plan (nothing was done)", ("point",), ("model MiB", "memory GiB", "about"), ("to do",))
    for point in points:
        own = tasks[point.name]
        size = "" if point.predicted_bytes is None else f"{point.predicted_bytes / 2**20:.2f}"
        what = point.problem or " → ".join(task.stage for task in own) or "up to date"
        table.add_row(point.name, size, *_taken(total(task.takes for task in own)), what)
    table.add_section()
    everything = total(task.takes for own in tasks.values() for task in own)
    table.add_row("total", "", *_taken(everything), f"kept in {cache}")
    return table


Tick = Callable[[str, float, float | None], None]


@contextlib.contextmanager
def progress(what: str, *columns: ProgressColumn) -> Iterator[Tick]:
    """Yield what to call with what is done, how much of it, and of how much: a bar, or now and then a line in a log."""
    parts = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*parts, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task, told = bar.add_task(what, total=None), time.monotonic()

        def tick(what: str, done: float, total: float | None) -> None:
            nonlocal told
            bar.update(task, description=what, completed=done, total=total)
            if not stderr.is_terminal and time.monotonic() - told >= _EVERY:
                told = time.monotonic()
                stderr.print(f"{what}: {done / total:.0%}" if total else f"{what} …")

        yield tick


@contextlib.contextmanager
def transfer(verb: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what to call with (bytes done, bytes in all)."""
    with progress(verb, DownloadColumn(), TransferSpeedColumn()) as tick:
        yield lambda done, total: tick(verb, done, total)
