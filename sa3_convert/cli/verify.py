"""`verify`: what a bundle really is."""

import json
from typing import TYPE_CHECKING

from sa3_convert.cli import verify_options as o
from sa3_convert.cli.options import BundleArgument, ComponentOption, JsonFileOption, ThreadsOption
from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    pass


def verify(
    bundle: BundleArgument,
    component: ComponentOption = None,
    json_file: JsonFileOption = None,
    report_folder: o.ReportOption = None,
    since: o.SinceOption = None,
    quick: o.QuickOption = False,
    full: o.FullOption = False,
    prompts: o.PromptsOption = None,
    seeds: o.SeedsOption = None,
    seconds: o.SecondsOption = None,
    case: o.CasesOption = None,
    steps: o.StepsOption = 8,
    engine: o.EngineOption = "mnn",
    references: o.ReferencesOption = None,
    references_mib: o.ReferencesMibOption = 2048,
    bisecting: o.BisectOption = None,
    backend: o.BackendOption = "cpu",
    memory: o.MemoryOption = "normal",
    precision: o.PrecisionOption = "high",
    threads: ThreadsOption = None,
) -> None:
    """Compare every model of a bundle with ONNX Runtime on its fp32 reference."""
    if not full and any(option is not None for option in (prompts, seeds, seconds, case, references)):
        raise UsageError("--prompts, --seeds, --seconds, --case and --references choose generations; add --full.")
    usual = (backend, memory, precision) == ("cpu", "normal", "high")
    if not usual and (full or report_folder is not None):
        raise UsageError("--backend, --memory and --precision are for `verify` without --full and --report.")
    if since is not None and report_folder is None:
        raise UsageError("--since says with what a report is compared; add --report DIR.")
    cases = o.chosen_cases(prompts, seeds, seconds, case)
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.check.bundle import verify_bundle
    from sa3_convert.check.reference_store import ReferenceStore
    from sa3_convert.cli.console import show_verdict
    from sa3_convert.cli.full import show_verification, shown_progress
    from sa3_convert.lab.generations.end_to_end import default_references
    from sa3_convert.lab.generations.full import Verification, verify_fully, with_bisections, workload
    from sa3_convert.system.files import write_text

    opened, components = Bundle.open(bundle), tuple(component or ())
    reporting = None
    if report_folder is not None:
        from sa3_convert.cli.full import ReportWriter

        reporting = ReportWriter(report_folder, since)
    if full:
        store = ReferenceStore(references or default_references(opened), references_mib << 20)
        work = workload(opened, cases, steps=steps, components=components, quick=quick)
        with shown_progress(work) as report:
            findings = verify_fully(
                opened,
                cases=cases,
                steps=steps,
                components=components,
                engine=engine,
                quick=quick,
                store=store,
                threads=threads,
                bisecting=bisecting is not False,
                report=report,
                heard=reporting.hear if reporting is not None else lambda case, side, audio: None,
            )
    else:
        findings = Verification.of(
            verify_bundle(
                opened,
                components=components,
                quick=quick,
                threads=threads,
                report=show_verdict,
                settings=None if usual else {"backend": backend, "memory": memory, "precision": precision},
            )
        )
        if bisecting:
            findings = with_bisections(opened, findings, threads=threads)
    if json_file is not None:
        write_text(json_file, json.dumps(findings.to_data(), indent=2) + "\n")
    show_verification(findings, bundle, references)
    if reporting is not None:
        reporting.write(opened, findings, bisecting=bisecting is not False, threads=threads)
    findings.check()
