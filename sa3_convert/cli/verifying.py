"""What `verify --full` shows: progress with the time left on stderr, tables on stdout."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sa3_convert.cli.console import stderr, stdout
from sa3_convert.verify.findings import Findings
from sa3_convert.verify.full_table import render_end_to_end, render_generations
from sa3_convert.verify.progress import Report
from sa3_convert.verify.table import render, render_bisect

_SPEED_OVER_SECONDS = 120


def show_findings(findings: Findings, bundle: Path) -> None:
    """Print everything that was found."""
    stdout.print(render(findings.bundle))
    if findings.generations is not None:
        stdout.print(render_generations(findings.generations, bundle), soft_wrap=True)
    if findings.end_to_end is not None:
        stdout.print(render_end_to_end(findings.end_to_end))
    for component, result in findings.bisections.items():
        stdout.print(f"\n{component.value}, bisected at its worst case:")
        stdout.print(render_bisect(result))


@contextlib.contextmanager
def shown_progress() -> Iterator[Report]:
    """Yield what shows work: on a terminal a bar per stage, elsewhere a line when a stage is done."""
    columns = (
        TextColumn("{task.description:<36}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
        speed_estimate_period=_SPEED_OVER_SECONDS,
    ) as progress:
        stage = _Stages(progress)
        try:
            yield stage.report
        finally:
            stage.end()


class _Stages:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)
        self._what = ""
        self._began = 0.0

    def report(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.end()
            self._what, self._began = what, time.monotonic()
            self._progress.reset(self._task, description=what, total=total)
        self._progress.update(self._task, completed=done, total=total)

    def end(self) -> None:
        if self._what and not stderr.is_terminal:
            stderr.print(f"{self._what:<44} {time.monotonic() - self._began:7.1f} s")
        self._what = ""
