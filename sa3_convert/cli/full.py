"""What `verify --full` and `--report` do around a verification: checks before, progress, results after."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sa3_convert.arrays import Floats
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.results import Progress
from sa3_convert.cli.comparison_tables import render_bisect, render_end_to_end, render_fidelity, render_generations
from sa3_convert.cli.console import stderr, stdout
from sa3_convert.lab.generations.full import Verification
from sa3_convert.lab.generations.trajectory import GenerationCase
from sa3_convert.lab.report.formatting import shown_size


class ReportWriter:
    """Writes the report of one verification to a folder, compared with an earlier `report.json` if there is one.

    Raises:
        UsageError: the folder holds something else.
        InputError: the earlier one is no report.

    """

    def __init__(self, folder: Path, since: Path | None) -> None:
        # What draws is loaded for a report alone.
        from sa3_convert.lab.report.build import check_folder
        from sa3_convert.lab.report.summary import read_report

        check_folder(folder)
        self._folder = folder
        self._since = None if since is None else read_report(since)
        self._heard: dict[str, dict[str, Floats]] = {}

    def hear(self, case: GenerationCase, side: str, audio: Floats) -> None:
        """Keep what was generated."""
        self._heard.setdefault(case.name, {})[side] = audio

    def write(self, bundle: Bundle, found: Verification, *, bisecting: bool, threads: int | None) -> None:
        """Look at every model operator by operator, if that is wanted, write the folder, and say where it stands."""
        from sa3_convert.lab.report.build import OPERATORS, PAGE, SUMMARY, bisected_models, write_report

        layers = {}
        if bisecting:
            with shown_progress({OPERATORS: 1.0}) as progress:
                layers = bisected_models(bundle, found, threads=threads, progress=progress)
        write_report(self._folder, bundle, found, layers=layers, heard=self._heard, since=self._since)
        page = self._folder / PAGE
        size = shown_size(page.stat().st_size)
        stderr.print(f"Report: {page} ({size}); for a pull request: {self._folder / SUMMARY}")


def show_verification(found: Verification, bundle: Path, references: Path | None = None) -> None:
    """Print everything that was found; where references were kept is part of the commands that replay a case."""
    stdout.print(render_fidelity(found))
    if found.generations is not None:
        generations = render_generations(found.generations, bundle, engine=found.engine, references=references)
        stdout.print(generations, soft_wrap=True)
    if found.end_to_end is not None:
        stdout.print(render_end_to_end(found.end_to_end))
    for one in found.recognitions:
        stdout.print(one.judgement)
    for component, result in found.bisections.items():
        stdout.print(f"\n{component.value}, bisected at its worst case:")
        stdout.print(render_bisect(result))


@contextlib.contextmanager
def shown_progress(work: Mapping[str, float]) -> Iterator[Progress]:
    """Yield what shows work: on a terminal a bar over all of it with the time left, elsewhere a line per stage.

    Args:
        work: how much each stage is, in any unit; see `workload`.

    """
    columns = (
        TextColumn("{task.description:<42}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        stages = _Stages(bar, work)
        try:
            yield stages.show
        finally:
            stages.end()


class _Stages:
    def __init__(self, bar: Bar, work: Mapping[str, float]) -> None:
        self._bar, self._work = bar, work
        self._task = bar.add_task("checking files", total=sum(work.values()))
        self._finished = 0.0
        self._what = ""
        self._began = 0.0

    def show(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.end()
            self._what, self._began = what, time.monotonic()
        completed = self._finished + self._work.get(what, 0) * done / total
        self._bar.update(self._task, description=f"{what} {done}/{total}", completed=completed)

    def end(self) -> None:
        self._finished += self._work.get(self._what, 0)
        self._bar.update(self._task, completed=self._finished)
        if self._what and not stderr.is_terminal:
            stderr.print(f"{self._what:<50} {time.monotonic() - self._began:7.1f} s")
        self._what = ""
