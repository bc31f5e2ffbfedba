"""What `verify --report` does around a verification: checks before it, audio from it, a folder after it."""

from pathlib import Path

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.cli.console import stderr
from sa3_convert.cli.verifying import shown_progress
from sa3_convert.verify.end_to_end import Floats
from sa3_convert.verify.findings import Findings
from sa3_convert.verify.generation import GenerationCase
from sa3_convert.verify.report.changes import read_report
from sa3_convert.verify.report.folder import PAGE, SUMMARY, check_folder
from sa3_convert.verify.report.shown import shown_size
from sa3_convert.verify.report.write import OPERATORS, bisected_models, write_report


class Reporting:
    """One report.

    Args:
        folder: where to write it.
        since: `report.json` of an earlier one.

    Raises:
        UsageError: the folder holds something else.
        InputError: `since` is no report.

    """

    def __init__(self, folder: Path, since: Path | None) -> None:
        check_folder(folder)
        self._folder = folder
        self._since = None if since is None else read_report(since)
        self._heard: dict[str, dict[str, Floats]] = {}

    def hear(self, case: GenerationCase, side: str, audio: Floats) -> None:
        """Keep what was generated."""
        self._heard.setdefault(case.name, {})[side] = audio

    def write(self, bundle: Bundle, findings: Findings, *, bisecting: bool, threads: int | None) -> None:
        """Look at every model operator by operator, if that is wanted, write the folder, and say where it stands."""
        layers = {}
        if bisecting:
            with shown_progress({OPERATORS: 1.0}) as progress:
                layers = bisected_models(bundle, findings, threads=threads, progress=progress)
        write_report(self._folder, bundle, findings, layers=layers, heard=self._heard, since=self._since)
        page = self._folder / PAGE
        size = shown_size(page.stat().st_size)
        stderr.print(f"Report: {page} ({size}); for a pull request: {self._folder / SUMMARY}")
