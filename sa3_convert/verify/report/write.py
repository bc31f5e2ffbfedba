"""`verify --report`: findings in, folder out."""

from collections.abc import Mapping
from pathlib import Path

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.components import Component
from sa3_convert.verify.bisect_bundle import bisect_bundle
from sa3_convert.verify.bisect_result import BisectResult
from sa3_convert.verify.findings import Findings
from sa3_convert.verify.progress import Report as Progress
from sa3_convert.verify.report.build import build_report
from sa3_convert.verify.report.drawing import Heard
from sa3_convert.verify.report.folder import DATA, PAGE, SUMMARY, write_folder
from sa3_convert.verify.report.page import render_page
from sa3_convert.verify.report.schema import Report
from sa3_convert.verify.report.summary import render_summary

OPERATORS = "operators"
"""What `bisected_models` calls its work."""


def bisected_models(
    bundle: Bundle,
    findings: Findings,
    *,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[Component, BisectResult]:
    """Bisect, on sampled inputs, each MNN model that was verified and that the findings have no bisection of.

    Args:
        bundle: what was verified.
        findings: what was found.
        threads: of either engine; None leaves it to them.
        progress: called as work goes on.

    """
    verified = [v.fidelity.component for v in findings.bundle.verdicts if v.engine == "mnn"]
    missing = [component for component in verified if component not in findings.bisections]
    found = {}
    for done, component in enumerate(missing):
        progress(OPERATORS, done, len(missing))
        found[component] = bisect_bundle(bundle, component, threads=threads)
    return found


def write_report(
    folder: Path,
    bundle: Bundle,
    findings: Findings,
    *,
    layers: Mapping[Component, BisectResult],
    heard: Heard,
    since: Report | None = None,
) -> None:
    """Write `index.html`, `report.json` and `summary.md`; the same arguments give the same bytes.

    Args:
        folder: new, empty, or an earlier report, which is replaced.
        bundle: what was verified.
        findings: what was found.
        layers: models operator by operator; those that fell short are in the findings already.
        heard: audio of the end-to-end comparison by case and side.
        since: an earlier report, to say what changed.

    Raises:
        UsageError: the folder holds something else.

    """
    report = build_report(bundle, findings, layers, has_audio=bool(heard), since=since)
    page = render_page(report, heard, bundle.layout.sample_rate)
    write_folder(folder, {PAGE: page, DATA: report.to_json(), SUMMARY: render_summary(report)})
