"""`verify`, `bisect`, `inspect` and `table`: what a bundle or file really is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sa3_convert.cli import verify_options as o
from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import BundleArgument, ComponentOption, JsonFileOption, OneComponentOption, ThreadsOption
from sa3_convert.cli.paths import reads
from sa3_convert.components import Component
from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    from sa3_convert.bundle.manifest import Bundle
    from sa3_convert.session import Arrays


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (verify, bisect, inspect, table):
        app.command()(command)


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
    from sa3_convert.bundle.manifest import Bundle
    from sa3_convert.cli.console import show_verdict
    from sa3_convert.cli.verifying import show_findings, shown_progress
    from sa3_convert.files import write_text
    from sa3_convert.verify.bundle import verify_bundle
    from sa3_convert.verify.findings import Findings
    from sa3_convert.verify.full import verify_fully, with_bisections
    from sa3_convert.verify.generations import default_references
    from sa3_convert.verify.reference_store import ReferenceStore
    from sa3_convert.verify.workload import workload

    opened, components = Bundle.open(bundle), tuple(component or ())
    reporting = None
    if report_folder is not None:
        from sa3_convert.cli.reporting import Reporting

        reporting = Reporting(report_folder, since)
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
        findings = Findings(
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
    show_findings(findings, bundle, references)
    if reporting is not None:
        reporting.write(opened, findings, bisecting=bisecting is not False, threads=threads)
    findings.check()


def bisect(
    bundle: BundleArgument,
    component: OneComponentOption,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE.npz", help="Inputs by name, instead of sampled ones.", callback=reads),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampled inputs; a verification names its cases'.")] = 0,
    latents: Annotated[int | None, typer.Option(min=1, help="T of the sampled inputs.")] = None,
    case: o.CaseOption = None,
    step: o.StepOption = None,
    case_steps: o.CaseStepsOption = 8,
    backend: o.BackendOption = "cpu",
    against: o.AgainstOption = None,
    references: o.ReferencesOption = None,
    json_file: JsonFileOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Name the first operator where a model leaves its reference, with what surrounds it."""
    if input_file is not None and case is not None:
        raise UsageError("--input and --case both say what the model is run with; give one of them.")
    if case is None and (step is not None or references is not None):
        raise UsageError("--step and --references belong to a case of a generation; add --case.")
    from sa3_convert.bundle.manifest import Bundle
    from sa3_convert.cli.console import stdout
    from sa3_convert.files import write_text
    from sa3_convert.verify.against import Runtime
    from sa3_convert.verify.bisect_bundle import bisect_bundle, bisect_bundle_against, read_feeds
    from sa3_convert.verify.table import render_against, render_bisect

    opened = Bundle.open(bundle)
    feeds: Arrays | None = None
    if input_file is not None:
        feeds = read_feeds(input_file, component, opened.layout)
    elif case is not None:
        feeds = _feeds_of(opened, component, case, step, steps=case_steps, references=references, threads=threads)
    how: dict[str, Any] = {"seed": seed, "latents": latents, "feeds": feeds}
    if against is None:
        found = bisect_bundle(opened, component, threads=threads, backend=backend, **how)
        data, shown = found.to_data(), render_bisect(found)
    else:
        sides = Runtime(backend, threads=threads), Runtime.parse(against)
        compared = bisect_bundle_against(opened, component, *sides, **how)
        data, shown = compared.to_data(), render_against(compared)
    if json_file is not None:
        write_text(json_file, json.dumps(data, indent=2) + "\n")
    stdout.print(shown)


def _feeds_of(
    bundle: "Bundle",
    component: Component,
    case: str,
    step: int | None,
    *,
    steps: int,
    references: Path | None,
    threads: int | None,
) -> "Arrays":
    """Return what a component is run with in a generation."""
    from sa3_convert.verify.case_feeds import case_feeds
    from sa3_convert.verify.generation import GenerationCase
    from sa3_convert.verify.generations import both_sides, default_references
    from sa3_convert.verify.reference_store import ReferenceStore

    store = ReferenceStore(references or default_references(bundle))
    with both_sides(bundle, store=store, steps=steps, threads=threads) as (kept, _):
        return case_feeds(kept, component, GenerationCase.parse(case), step)


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE.mnn", help="Any MNN model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a .mnn file holds: I/O, and per operator the stored type, bits, block and bytes."""
    from sa3_convert.cli.console import stdout
    from sa3_convert.mnn.inspect import render
    from sa3_convert.mnn.storage import read_storage

    storage = read_storage(file)
    if as_json:
        echo(storage.to_json())
    else:
        stdout.print(render(storage))


def table(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE…", help="Folders that `convert` made.")],
    bench: Annotated[
        list[Path] | None, typer.Option("--bench", metavar="FILE.json", help="Add times and memory of `bench --json`.")
    ] = None,
) -> None:
    """Print size and fidelity of each component of several bundles as one Markdown table."""
    from sa3_convert.bundle.manifest import Bundle
    from sa3_convert.bundle.table import Bench, markdown_table

    benches = [Bench.read(path) for path in bench or ()]
    echo(markdown_table([Bundle.open(path) for path in bundles], benches))
