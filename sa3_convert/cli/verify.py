"""`verify`: what a bundle really is."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from sa3_convert.cli import options as o
from sa3_convert.cli import paths
from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.lab.generations.full import Verification
    from sa3_convert.lab.generations.trajectory import GenerationCase

_full, _report = o.panel("With --full"), o.panel("Report")

QuickOption = Annotated[bool, Option("--quick", help="Fewer and shorter sampled inputs: what `convert` runs.")]
FullOption = Annotated[bool, Option("--full", help="Also compare whole generations, step by step and end to end.")]
BisectOption = Annotated[
    bool | None,
    Option(
        "--bisect/--no-bisect",
        help="Name the operator to blame in models that fall short; the default of --full. With --report: show every "
        "model's operators; the default.",
    ),
]
PromptsOption = Annotated[str | None, _full(metavar="N,N,…", help="By number, 0 to 7; all by default.")]
SeedsOption = Annotated[str | None, _full(metavar="N,N,…", help="Start noises; 0,1 by default.")]
SecondsOption = Annotated[str | None, _full(metavar="S,S,…", help="Durations; 2,5,10 by default.")]
CasesOption = Annotated[list[str] | None, _full(metavar=o.CASE, help="This generation only; several times.")]
StepsOption = Annotated[int, _full(min=1, max=1000, help="Denoising steps.")]
EngineOption = Annotated[
    Literal["mnn", "onnxruntime-int8", "onnxruntime-fp16"], _full(help="What runs the generations.")
]
ReferencesMibOption = Annotated[
    int, Option(min=1, help="Bound of that folder; what was used least recently goes first.")
]
ReportOption = Annotated[
    Path | None,
    _report(
        "--report",
        metavar="DIR",
        help="Write index.html, report.json and summary.md there, in place of an earlier one.",
        callback=paths.makes,
    ),
]
SinceOption = Annotated[
    Path | None,
    _report(metavar="REPORT.json", help="Also say what changed since this earlier one.", callback=paths.reads),
]
CheckpointOption = Annotated[
    str | None,
    Option(
        metavar="DIR",
        help="Compare with references exported from this checkpoint: for models that others published.",
        callback=paths.opens,
    ),
]


def verify(
    bundle: o.BundleArgument,
    component: o.ComponentOption = None,
    quick: QuickOption = False,
    full: FullOption = False,
    bisecting: BisectOption = None,
    offline: o.OfflineOption = False,
    json_file: o.JsonOption = None,
    checkpoint: CheckpointOption = None,
    prompts: PromptsOption = None,
    seeds: SeedsOption = None,
    seconds: SecondsOption = None,
    case: CasesOption = None,
    steps: StepsOption = 8,
    engine: EngineOption = "mnn",
    references: o.ReferencesOption = None,
    references_mib: ReferencesMibOption = 2048,
    workers: o.WorkersOption = None,
    scheduler: o.SchedulerOption = None,
    report_folder: ReportOption = None,
    since: SinceOption = None,
    backend: o.BackendOption = "cpu",
    memory: o.MemoryOption = "normal",
    precision: o.PrecisionOption = "high",
    threads: o.ThreadsOption = None,
) -> None:
    """Compare every model of a bundle with its fp32 reference."""
    settings = {"backend": backend, "memory": memory, "precision": precision}
    usual = settings == {"backend": "cpu", "memory": "normal", "precision": "high"}
    _refuse(full, usual, report_folder, since, (prompts, seeds, seconds, case, references, workers, scheduler))
    chosen = chosen_cases(prompts, seeds, seconds, case)
    from sa3_convert.bundle.manifest import UNVERIFIED
    from sa3_convert.cli.console import open_told
    from sa3_convert.cli.full import ReportWriter, show_verification
    from sa3_convert.lab.generations.trajectory import possible_cases

    bundle = o.brought(bundle, offline)
    opened = open_told(bundle)
    reporting = None if report_folder is None else ReportWriter(report_folder, since)
    if checkpoint is not None and (full or report_folder is not None or not usual or bisecting):
        raise UsageError("--checkpoint compares sampled inputs on the CPU; give --component, --quick, --threads alone.")
    if opened.is_foreign and checkpoint is None:
        raise UsageError(f"{bundle} is {UNVERIFIED}: it has no references. Give its checkpoint: --checkpoint DIR.")
    how: dict[str, Any] = {"components": tuple(component or ()), "quick": quick, "threads": threads}
    if checkpoint is not None:
        findings = _against(opened, checkpoint, **how)
    elif full:
        how |= {} if reporting is None else {"heard": reporting.hear}
        cases = chosen if seconds is not None or case else possible_cases(chosen, opened.layout)
        how |= {"cases": cases, "steps": steps, "engine": engine, "bisecting": bisecting is not False}
        findings = _whole_generations(opened, references, references_mib << 20, workers, scheduler, **how)
    else:
        findings = _sampled_inputs(opened, settings=None if usual else settings, bisecting=bool(bisecting), **how)
    o.write_figures(json_file, findings.to_data() | o.hub_origin(bundle))
    show_verification(findings, bundle, references)
    if reporting is not None:
        reporting.write(opened, findings, bisecting=bisecting is not False, threads=threads)
    findings.check()


def _refuse(full: bool, usual: bool, report: Path | None, since: Path | None, generations: Sequence[object]) -> None:
    """Refuse options that contradict each other."""
    if not full and any(option is not None for option in generations):
        raise UsageError(
            "--prompts, --seeds, --seconds, --case, --references, --workers and --scheduler are about generations; add "
            "--full."
        )
    if not usual and (full or report is not None):
        raise UsageError("--backend, --memory and --precision are for `verify` without --full and --report.")
    if since is not None and report is None:
        raise UsageError("--since says with what a report is compared; add --report DIR.")


def _whole_generations(
    bundle: "Bundle",
    references: Path | None,
    limit: int,
    workers: int | None,
    scheduler: str | None,
    **how: Any,
) -> "Verification":
    from sa3_convert.check.reference_store import ReferenceStore
    from sa3_convert.cli.full import shown_progress
    from sa3_convert.lab.generations.end_to_end import default_references
    from sa3_convert.lab.generations.full import recognised, verify_fully, workload
    from sa3_convert.scheduling import threads_each

    runner = o.runner_on(workers, scheduler)
    store = ReferenceStore(references or default_references(bundle), limit)
    how["threads"] = how["threads"] or (workers and threads_each(workers))
    what = {name: how[name] for name in ("steps", "components", "quick")}
    with shown_progress(workload(bundle, how["cases"], on_workers=runner is not None, **what)) as report:
        found = verify_fully(bundle, store=store, report=report, runner=runner, **how)
        if found.end_to_end is None:
            return found
        heard = recognised(bundle, ("onnxruntime", found.engine), steps=how["steps"], report=report)
    return replace(found, recognitions=heard)


def _against(bundle: "Bundle", checkpoint: str, **how: Any) -> "Verification":
    from sa3_convert.cli.console import show_verdict
    from sa3_convert.convert.reference import verify_against
    from sa3_convert.lab.generations.full import Verification

    return Verification.of(verify_against(bundle, o.open_checkpoint(checkpoint, None), report=show_verdict, **how))


def _sampled_inputs(bundle: "Bundle", *, bisecting: bool, threads: int | None, **how: Any) -> "Verification":
    from sa3_convert.check.bundle import verify_bundle
    from sa3_convert.cli.console import show_raised, show_verdict
    from sa3_convert.lab.generations.full import Verification, with_bisections
    from sa3_convert.runtime.engines import bundle_engine

    show_raised(bundle_engine(bundle, "mnn", how["settings"] or {}, check=False))
    findings = Verification.of(verify_bundle(bundle, threads=threads, report=show_verdict, **how))
    return with_bisections(bundle, findings, threads=threads) if bisecting else findings


def chosen_cases(
    prompts: str | None, seeds: str | None, seconds: str | None, names: Sequence[str] | None
) -> "tuple[GenerationCase, ...]":
    """Return the generations that options choose: by name, or all of some prompts, seeds and durations."""
    from sa3_convert.lab.generations.trajectory import DURATIONS, PROMPTS, SEEDS, GenerationCase, all_cases

    if names:
        if any(option is not None for option in (prompts, seeds, seconds)):
            raise UsageError("--case names whole generations; --prompts, --seeds and --seconds do not go with it.")
        return tuple(dict.fromkeys(GenerationCase.parse(name) for name in names))
    numbers = o.listed("--prompts", prompts, int, range(len(PROMPTS)), lambda n: 0 <= n < len(PROMPTS))
    starts = o.listed("--seeds", seeds, int, SEEDS, lambda n: 0 <= n < 1 << 64)
    return all_cases(numbers, starts, o.listed("--seconds", seconds, float, DURATIONS, o.is_duration))
