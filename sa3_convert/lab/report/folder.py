"""`verify --report`: what was found in, a folder out, whole or not there."""

from collections.abc import Mapping
from pathlib import Path

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.results import Progress
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.bisect.bisect import bisect_bundle
from sa3_convert.lab.bisect.result import BisectResult
from sa3_convert.lab.generations.full import Verification
from sa3_convert.lab.report.build import build_report
from sa3_convert.lab.report.page import Heard, render_page
from sa3_convert.lab.report.schema import KIND, Report
from sa3_convert.lab.report.summary import render_summary
from sa3_convert.system.files import partial_folder, write_text
from sa3_convert.system.untrusted import read_json

DATA = "report.json"
PAGE = "index.html"
SUMMARY = "summary.md"
_NAMES = {DATA, PAGE, SUMMARY}


def check_folder(folder: Path) -> None:
    """Check, before any long work, that a report can be written there.

    Raises:
        UsageError: a file stands there, or a folder with files that are no report's, or one that cannot be replaced.

    """
    if not folder.exists():
        return
    if folder.is_mount() or folder.resolve() == Path.cwd():
        raise UsageError(f"{folder} cannot be replaced as a whole. Name a folder inside it.")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file. Name a folder for the report.")
    names = {entry.name for entry in folder.iterdir()}
    if names and not (names <= _NAMES and _is_report(folder / DATA)):
        raise UsageError(
            f"{folder} holds {sorted(names - _NAMES or names)[0]}, which is no part of a report. Name a new or empty "
            "folder, or one that holds an earlier report."
        )


def _is_report(file: Path) -> bool:
    try:
        data = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("kind") == KIND


def write_folder(folder: Path, contents: Mapping[str, str]) -> None:
    """Write a report's files under a temporary name and rename the folder; an earlier report is replaced.

    Raises:
        UsageError: see `check_folder`; or the folder cannot be written.

    """
    check_folder(folder)
    try:
        _replace(folder.resolve(), contents)
    except OSError as error:
        raise UsageError(f"The report cannot be written to {folder}: {error.strerror or error}.") from None


def _replace(folder: Path, contents: Mapping[str, str]) -> None:
    with partial_folder(folder) as old, partial_folder(folder) as new:
        for name, text in contents.items():
            write_text(new / name, text)
        stood = folder.exists()
        try:
            if stood:
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            # Between the two renames the earlier report goes back.
            if stood and not folder.exists():
                old.rename(folder)
            raise


OPERATORS = "operators"
"""What `bisected_models` calls its work."""


def bisected_models(
    bundle: Bundle,
    found: Verification,
    *,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[Component, BisectResult]:
    """Bisect, on sampled inputs, each MNN model that was verified and that there is no bisection of."""
    missing = [v.component for v in found.verdicts if v.engine == "mnn" and v.component not in found.bisections]
    layers = {}
    for done, component in enumerate(missing):
        progress(OPERATORS, done, len(missing))
        layers[component] = bisect_bundle(bundle, component, threads=threads)
    return layers


def write_report(
    folder: Path,
    bundle: Bundle,
    found: Verification,
    *,
    layers: Mapping[Component, BisectResult],
    heard: Heard,
    since: Report | None = None,
) -> None:
    """Write `index.html`, `report.json` and `summary.md`; the same arguments give the same bytes.

    Args:
        folder: new, empty, or an earlier report, which is replaced.
        bundle: what was verified.
        found: what was found.
        layers: models operator by operator; those that fell short are in what was found already.
        heard: audio of the end-to-end comparison by case and side.
        since: an earlier report, to say what changed.

    Raises:
        UsageError: the folder holds something else.

    """
    report = build_report(bundle, found, layers, has_audio=bool(heard), since=since)
    page = render_page(report, heard, bundle.layout.sample_rate)
    write_folder(folder, {PAGE: page, DATA: report.to_json(), SUMMARY: render_summary(report)})
