"""`drift`: a bundle's figures against those of a kept baseline."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import (
    CASE,
    BundleArgument,
    JsonOption,
    OfflineOption,
    ReferencesOption,
    ThreadsOption,
    brought,
    write_figures,
)
from sa3_convert.cli.paths import updates
from sa3_convert.errors import DriftError, UsageError

if TYPE_CHECKING:
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.lab.drift.compare import Drift
    from sa3_convert.lab.drift.drift import Plan

CasesOption = Annotated[
    list[str] | None, Option(metavar=CASE, help="With --update: what to generate; several times. The baseline's else.")
]


def drift(
    bundle: BundleArgument,
    baseline: Annotated[Path, Option(metavar="FILE", help="The kept figures, drift.json.", callback=updates)],
    update: Annotated[bool, Option("--update", help="Make this bundle the baseline; asks for --reason.")] = False,
    reason: Annotated[str, Option(metavar="TEXT", help="Why, kept in the file's history.")] = "",
    case: CasesOption = None,
    no_speed: Annotated[bool, Option("--no-speed", help="Leave the speed ratios out.")] = False,
    offline: OfflineOption = False,
    json_file: JsonOption = None,
    references: ReferencesOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Compare a bundle's figures with those of a kept baseline.

    Sizes, storage, fidelity and speed; exit code 6 when one fell.
    """
    if update and not reason.strip():
        raise UsageError("--update makes these figures right from now on: say why, --reason 'MNN 3.7, 0.2 dB less'.")
    if not update and (reason or case):
        raise UsageError("--reason and --case are for --update.")
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.check.reference_store import ReferenceStore
    from sa3_convert.lab.drift.drift import Plan, cases_of
    from sa3_convert.lab.generations.end_to_end import default_references

    opened = Bundle.open(brought(bundle, offline))
    store = ReferenceStore(references or default_references(opened))
    plan = Plan(threads=threads, speed=not no_speed, store=store)
    if update:
        plan = replace(plan, cases=cases_of(baseline, opened, case or ()))
        _update(opened, baseline, reason.strip(), plan, json_file)
    else:
        _check(opened, baseline, plan, json_file)


def _update(bundle: "Bundle", file: Path, reason: str, plan: "Plan", json_file: Path | None) -> None:
    from sa3_convert.cli.comparison_tables import render_baseline, render_drift
    from sa3_convert.cli.console import stdout
    from sa3_convert.cli.full import shown_progress
    from sa3_convert.lab.drift.drift import update_baseline

    with shown_progress(_work(bundle, plan)) as report:
        made, change = update_baseline(file, bundle, reason, plan, report)
    if change is not None:
        _save(json_file, change)
    stdout.print(render_baseline(made) if change is None else render_drift(change))
    echo(f"{file}: {' '.join(made.key)} is the baseline now, because: {reason}")


def _check(bundle: "Bundle", file: Path, plan: "Plan", json_file: Path | None) -> None:
    from sa3_convert.cli.comparison_tables import render_drift
    from sa3_convert.cli.console import stdout
    from sa3_convert.cli.full import shown_progress
    from sa3_convert.lab.drift.compare import FORMULA
    from sa3_convert.lab.drift.drift import check_drift, find_baseline, plan_of

    baseline = find_baseline(file, bundle)
    plan = plan_of(baseline, plan)
    with shown_progress(_work(bundle, plan)) as report:
        found = check_drift(bundle, baseline, plan, report)
    _save(json_file, found)
    stdout.print(render_drift(found))
    echo(FORMULA)
    for line in found.changes:
        echo(f"changed: {line}")
    if not found.passed:
        raise DriftError(_complaint(bundle, file, found))


def _work(bundle: "Bundle", plan: "Plan") -> dict[str, float]:
    """Return the cost of each stage: those of a full verification but for what is end to end."""
    from sa3_convert.lab.generations.end_to_end import CHAOS, TARGET, TARGET_AUDIO
    from sa3_convert.lab.generations.full import workload

    work = workload(bundle, plan.cases, steps=plan.steps, quick=True)
    return {stage: cost for stage, cost in work.items() if stage not in (CHAOS, TARGET, TARGET_AUDIO)}


def _complaint(bundle: "Bundle", file: Path, found: "Drift") -> str:
    """Return what moved, and what to do next."""
    from sa3_convert.lab.drift.compare import worst_cases
    from sa3_convert.lab.report.formatting import bisect_command

    names = dict.fromkeys(row.figure.component.value for row in found.failures)
    since = found.baseline.history[-1]
    lines = [
        f"{len(found.failures)} of {len(found.rows)} figures of {bundle.path} moved further than they may since "
        f"{since.date} ({since.reason}), in {', '.join(names)}; the table shows them. Look closer with:"
    ]
    for figure in worst_cases(found.failures):
        lines.append(f"  {bisect_command(bundle.path, figure.component, figure.case or '', figure.step)}")
    update = ["sa3-convert", "drift", str(bundle.path), "--baseline", str(file), "--update", "--reason", "…"]
    lines.append(f"If it is meant to be so: {shlex.join(update)}")
    return "\n".join(lines)


def _save(file: Path | None, found: "Drift") -> None:
    from sa3_convert.lab.drift.compare import FORMULA

    write_figures(file, {"rule": FORMULA, **found.to_data()})
