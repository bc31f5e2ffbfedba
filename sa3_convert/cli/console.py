"""What the commands print while they work and when they are done: progress on stderr, results on stdout."""

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.control import Control
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.segment import ControlType, Segment
from rich.table import Table

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.results import Verdict
from sa3_convert.components import Component
from sa3_convert.convert.conversion import StageEvent
from sa3_convert.convert.plan import ComponentPlan, ConversionPlan, ConvertRequest, Estimate, bytes_needed, total
from sa3_convert.convert.stages import STAGES, STAGES_OF
from sa3_convert.system.untrusted import printable

if TYPE_CHECKING:
    from sa3_convert.checkpoint.lora import Lora
    from sa3_convert.lab.planner.planner import Plan as BitPlan


_PIPED_WIDTH = 140
"""Columns for tables that go to a file or a log, where nothing says how wide it is."""


class EscapingConsole(Console):
    """Shows as text what would control the terminal: only rich itself controls it, with segments of that kind."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield what is written to the terminal."""
        for segment in super().render(renderable, options):
            plain = segment.control or segment.text.isprintable() or segment.text == "\n"
            yield segment if plain else Segment(printable(segment.text), segment.style)


# Names, paths and regular expressions have brackets that are no markup.
stdout = EscapingConsole(highlight=False, markup=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
stderr = EscapingConsole(stderr=True, highlight=False, markup=False, soft_wrap=True)


def show_stage(event: StageEvent) -> None:
    """Print one line per finished stage; a started one is shown on a terminal only."""
    name = f"{event.component.value:<18}"
    if event.state == "started":
        if stderr.is_terminal:
            stderr.print(f"{name} {STAGES[event.stage].verb} …", Control(ControlType.CARRIAGE_RETURN), end="")
        return
    time = "unchanged" if event.state == "reused" else f"{event.seconds:.1f} s"
    stderr.print(f"{name} {event.stage:<9} {time:>10}  {event.detail:<24}")


def show_verdict(verdict: Verdict) -> None:
    """Print one line per verified model."""
    fidelity = verdict.fidelity
    stderr.print(f"{fidelity.component.value:<18} {verdict.engine:<16} {fidelity.worst.signal_to_noise_db:.1f} dB")


def lora_table(lora: "Lora") -> Table:
    """Return what a LoRA is and which layers it changes; `*` stands for numbers."""
    file = lora.file
    table = Table(
        title=f"{file.path.name}: {file.type_name}, rank {file.rank}, alpha {file.alpha:g}, strength {lora.strength:g}",
        title_justify="left",
    )
    table.add_column("layers that it changes", overflow="fold")
    table.add_column("count", justify="right")
    kinds = Counter(re.sub(r"\.\d+(?=\.)", ".*", layer) for layer in lora.layers.values())
    for kind, count in sorted(kinds.items()):
        table.add_row(kind, str(count))
    table.add_section()
    table.add_row("total", str(len(lora.layers)))
    if left_out := len(file.layers) - len(lora.layers):
        table.add_row("left out by its own filters", str(left_out))
    return table


def bundle_table(bundle: Bundle) -> Table:
    """Return the closing table of a conversion: what was made, how big, how close, and its hash."""
    table = Table(
        title=f"{bundle.path}: {bundle.manifest.label}, recipe {bundle.manifest.recipe}", title_justify="left"
    )
    table.add_column("component")
    table.add_column("precision")
    table.add_column("MiB", justify="right")
    table.add_column("SNR dB", justify="right")
    table.add_column("floor", justify="right")
    table.add_column("cosine", justify="right")
    table.add_column("for MNN")
    table.add_column("SHA-256")
    total = 0
    for artifact in bundle.manifest.artifacts:
        if artifact.kind != "mnn" or artifact.fidelity is None or artifact.component is None:
            continue
        size = sum(entry.bytes for entry in artifact.files)
        total += size
        table.add_row(
            artifact.component.value,
            artifact.precision,
            f"{size / 2**20:.2f}",
            f"{artifact.fidelity.signal_to_noise_db:.1f}",
            "" if artifact.floor_db is None else f"{artifact.floor_db:g}",
            f"{artifact.fidelity.cosine:.6f}",
            f"{artifact.target_mnn}+" if artifact.target_mnn else "",
            artifact.sha256[:16],
        )
    table.add_section()
    table.add_row("total", "", f"{total / 2**20:.2f}")
    return table


def plan_table(request: ConvertRequest, plan: ConversionPlan) -> Table:
    """Return what a conversion would do, with sizes estimated from the tensors' shapes."""
    steps = plan.steps
    table = Table(title=f"Plan for {request.out} (nothing was done)", title_justify="left")
    for name in ("component", "precision"):
        table.add_column(name)
    table.add_column("reference MiB", justify="right")
    for name in ("model MiB", "memory GiB", "about"):
        table.add_column(name, justify="right")
    table.add_column("to do")
    for step in steps:
        precision = request.recipe.for_component(step.component).precision
        sizes = (f"{size / 2**20:.2f}" for size in (step.reference_bytes, step.model_bytes))
        table.add_row(step.component.value, precision, *sizes, *_taken(step.takes), _to_do(step) or "up to date")
    if plan.existing is not None and not plan.up_to_date:
        table.add_row("bundle", "", "", "", "", "", "; ".join(_bundle_to_do(plan)))
    table.add_section()
    totals = (sum(s.reference_bytes for s in steps), sum(s.model_bytes for s in steps))
    table.add_row(
        "total",
        "",
        *(f"{size / 2**20:.2f}" for size in totals),
        *_taken(total(step.takes for step in steps)),
        f"{bytes_needed(steps) / 2**20:.0f} MiB of disk",
    )
    return table


def _to_do(step: ComponentPlan) -> str:
    """Return the stages that run, and the files that are put in place from what earlier runs left."""
    ready = [kind for kind in step.place if not set(STAGES_OF[kind]) & set(step.todo)]
    return " → ".join((*step.todo, *([f"place {', '.join(ready)}"] if ready else [])))


def _bundle_to_do(plan: ConversionPlan) -> Iterator[str]:
    """Yield what changes in a bundle besides its components' files."""
    if plan.shared:
        yield f"write {', '.join(plan.shared)}"
    if plan.dropped:
        yield f"leave out {', '.join(dropped(plan))}"
    yield "write the manifest"


def dropped(plan: ConversionPlan) -> list[str]:
    """Return what a bundle had and will not have."""
    return [f"{a.kind} of {a.component.value}" if a.component else a.kind for a in plan.dropped]


def _taken(takes: Estimate) -> tuple[str, str]:
    """Return memory and time for a table; nothing for what is done."""
    if not takes.seconds:
        return "", ""
    minutes, seconds = divmod(round(takes.seconds), 60)
    return f"{takes.memory_bytes / 2**30:.1f}", f"{minutes} min" if minutes > 2 else f"{60 * minutes + seconds} s"


def planned_table(component: Component, plan: "BitPlan") -> Table:
    """Return how many layers a plan stores at each precision, and which layers it keeps highest."""
    table = Table(title=f"{component.value}: {plan.size / 2**20:.2f} MiB", title_justify="left")
    for name in ("bits", "block"):
        table.add_column(name)
    for name in ("layers", "MiB", "share of the error"):
        table.add_column(name, justify="right")
    table.add_column("for example")
    groups: dict[tuple[int, int], list[str]] = {}
    for pattern, option in plan.allocation.chosen.items():
        groups.setdefault((option.bits or 16, option.block_size or 0), []).append(pattern)
    for (bits, block), patterns in sorted(groups.items(), reverse=True):
        chosen = [plan.allocation.chosen[pattern] for pattern in patterns]
        layers = [layer for pattern in patterns for layer in plan.layers[pattern]]
        table.add_row(
            "fp16" if bits == 16 else str(bits),
            str(block) if block else "channel",
            str(len(layers)),
            f"{sum(option.size for option in chosen) / 2**20:.2f}",
            f"{sum(option.error for option in chosen) / max(plan.allocation.error, 1e-30):.0%}",
            ", ".join(layers[:2]) + (", …" if len(layers) > 2 else ""),
        )
    return table


@contextlib.contextmanager
def transfer(verb: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what to call with (bytes done, bytes in all)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(verb, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
