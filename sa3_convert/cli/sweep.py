"""`sweep`: many recipes of one checkpoint, and which are worth keeping."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Exit, Option

from sa3_convert.cli import options as o
from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo
from sa3_convert.cli.plan import measured, tell_measuring
from sa3_convert.components import Component
from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    from sa3_convert.lab.common import Common
    from sa3_convert.lab.planner.sensitivity import Sensitivity
    from sa3_convert.lab.sweep.points import Point
    from sa3_convert.lab.sweep.result import Sweep
    from sa3_convert.lab.sweep.whole import Suite
    from sa3_convert.recipe import Recipe
    from sa3_convert.scheduling import Runner

FIGURES = "sweep.json"
BUDGET_RECIPE = Path("small")
"""Of which a budget's recipe has all that is not decided layer by layer."""
OutOption = Annotated[Path, Option(metavar="DIR", help="Gets sweep.json, a page, and recipes.", callback=paths.makes)]
SizesOption = Annotated[
    str | None, Option(metavar="FROM:TO:STEP", help="Plan one component for these sizes in MiB; or 200,300.")
]
RecipesOption = Annotated[
    list[Path] | None, Option("--recipe", help="Try this recipe (repeatable).", callback=paths.reads)
]
BudgetOption = Annotated[
    float | None, Option(min=0.01, max=1e6, help="Share so many MiB among all components by what hurts the end result.")
]
FullOption = Annotated[
    bool, Option("--full", help="Also compare whole generations with each point, the others as in int8.")
]
CasesOption = Annotated[list[str] | None, Option(metavar=o.CASE, help="With --full this generation only; repeatable.")]
StoreOption = Annotated[
    str,
    Option(metavar="ADDRESS", help="Keep results here, too: s3://BUCKET/FOLDER, or what fsspec has."),
]


def sweep(
    checkpoint: o.CheckpointArgument,
    out: OutOption,
    component: o.ComponentOption = None,
    sizes: SizesOption = None,
    recipe: RecipesOption = None,
    budget_mib: BudgetOption = None,
    full: FullOption = False,
    case: CasesOption = None,
    lora: o.LoraOption = None,
    workers: o.WorkersOption = None,
    scheduler: o.SchedulerOption = None,
    cache: Annotated[Path | None, Option(metavar="DIR", help="Where stages are kept; beside --out.")] = None,
    store: StoreOption = "",
    dry_run: Annotated[bool, Option("--dry-run", help="Say what each point takes, and stop.")] = False,
    json_file: o.JsonOption = None,
    threads: o.ThreadsOption = None,
) -> None:
    """Find the recipes that are best for their size.

    Each is converted and measured. What is done stays done: the same command again does only what is missing.
    """
    if sizes is None and not recipe and budget_mib is None:
        raise UsageError("Give --sizes FROM:TO:STEP with one --component, --recipe, or --budget-mib.")
    runner = o.runner_on(workers, scheduler)
    _refuse(out, sizes, component or (), case, full=full)
    from sa3_convert.cli.console import stdout, sweep_table
    from sa3_convert.convert.plan import chosen_components
    from sa3_convert.lab.common import Common, Store
    from sa3_convert.lab.sweep.points import label_of, of_own_names, of_recipes
    from sa3_convert.scheduling import in_this_process

    if store:
        store = Store(store).address
    opened = o.open_checkpoint(checkpoint, lora)
    folder = o.cache_of(cache, out)
    common = Common.of(opened, folder, lora, store=store, threads=threads)
    chosen = chosen_components(opened.layout, component or ())
    label = f"within-{label_of(budget_mib)}" if budget_mib is not None else ""
    points = of_recipes([o.open_recipe(one) for one in recipe or ()], chosen)
    suite = _suite(common, case, runner) if full else None
    points += _planned(common, chosen, sizes, budget_mib, label, None if dry_run else runner or in_this_process)
    of_own_names(points)
    if dry_run:
        _tell_plan(common, points, () if sizes is None and budget_mib is None else chosen, suite, workers or 1)
        return
    with _alone_in(out):
        found = _swept(common, points, runner or in_this_process, suite)
        _write_down(found, points, label, out, json_file)
    stdout.print(sweep_table(found))
    _tell_end(found, out)


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    from sa3_convert.system.files import alone_in

    out.mkdir(parents=True, exist_ok=True)
    try:
        with alone_in(out):
            yield
    except BlockingIOError:
        raise UsageError(f"Another sweep into {out} is under way. Wait for it, or name another folder.") from None


def _write_down(found: "Sweep", points: "Sequence[Point]", label: str, out: Path, json_file: Path | None) -> None:
    from sa3_convert.lab.sweep.sweep import whole_recipe, write
    from sa3_convert.system.files import partial_folder, take_name, write_text

    figures = found.model_dump(mode="json", by_alias=True)
    with partial_folder(out) as made:
        write(found, points, o.open_recipe(o.DEFAULT_RECIPE), made)
        if whole := whole_recipe(found, points, o.open_recipe(BUDGET_RECIPE), label):
            write_text(made / f"{label}.yaml", whole.to_yaml())
        o.write_figures(made / FIGURES, figures)
        # First what tells the next sweep that the folder is one's.
        for file in sorted(made.iterdir(), key=lambda file: file.name != FIGURES):
            take_name(file, out / file.name)
    o.write_figures(json_file, figures)


def _tell_end(found: "Sweep", out: Path) -> None:
    """Say what is missing, and end with what is worst of it."""
    if found.mixed:
        echo("Points come from several kinds of processor or versions of MNN, which differ a little: see the page.")
    echo(f"Page: {out / 'index.html'}")
    for point in found.missing:
        echo(f"{point.name} is missing: {point.problem}", err=True)
    if found.missing:
        raise Exit(max(point.exit_code for point in found.missing))


def _suite(common: "Common", case: Sequence[str] | None, runner: "Runner | None") -> "Suite":
    from sa3_convert.cli.verify import chosen_cases
    from sa3_convert.lab.generations.trajectory import possible_cases
    from sa3_convert.lab.sweep.whole import Suite

    chosen = chosen_cases(None, None, None, case)
    cases = chosen if case else possible_cases(chosen, common.open().layout)
    suite = Suite(common, o.open_recipe(o.DEFAULT_RECIPE), cases, runner)
    suite.require()
    return suite


def _swept(common: "Common", points: "Sequence[Point]", runner: "Runner", suite: "Suite | None") -> "Sweep":
    from sa3_convert.cli.console import progress
    from sa3_convert.lab.sweep.sweep import run_sweep
    from sa3_convert.lab.sweep.whole import with_generations

    with progress(f"{len(points)} points") as tick:
        told = partial(tick, f"{len(points)} points")
        found = run_sweep(common, points, runner, lambda _, __, *done: told(*done))
        return found if suite is None else with_generations(suite, points, found, tick)


def _refuse(
    out: Path, sizes: str | None, chosen: Sequence[Component], case: Sequence[str] | None, *, full: bool
) -> None:
    if case and not full:
        raise UsageError("--case is about generations; add --full.")
    if sizes is not None and len(chosen) != 1:
        raise UsageError("--sizes are of one component. Name it: --component dit.")
    if out.is_dir() and any(out.iterdir()) and not (out / FIGURES).is_file():
        raise UsageError(f"{out} holds something else than a sweep. Name a folder that is empty or not there.")


def _tell_plan(
    common: "Common", points: "Sequence[Point]", measured: Sequence[Component], suite: "Suite | None", workers: int
) -> None:
    """Say what is left to measure and to make, and how long it takes."""
    from sa3_convert.cli.console import stdout, sweep_plan_table
    from sa3_convert.lab.planner.measuring import to_measure
    from sa3_convert.lab.sweep.tasks import tasks_for, to_do
    from sa3_convert.scheduling import simulated

    own = to_do(points, tasks_for([point for point in points if not point.problem], common))
    stdout.print(sweep_plan_table(points, own, common.cache))
    if measured:
        tell_measuring([part for one in measured for part in to_measure(common, one, "fp16")], workers)
    found = simulated([task for tasks in own.values() for task in tasks], workers)
    echo(
        f"On {workers} worker{'s'[: workers > 1]} about {found.seconds / 60:.1f} min, {found.efficiency:.0%} of it "
        f"at work; tasks that follow one another take {found.longest_chain / 60:.1f} min on any number of them."
    )
    if suite is not None:
        echo(f"Then {len(suite.cases)} generations with each point, which take what `verify --full` takes.")


def _planned(
    common: "Common",
    chosen: Sequence[Component],
    sizes: str | None,
    budget_mib: float | None,
    label: str,
    runner: "Runner | None",
) -> "list[Point]":
    """Return what is planned for sizes and for a budget, unless nothing may be measured for it."""
    from sa3_convert.lab.sweep.points import label_of, of_sizes, parse_sizes, shares_of, unplanned

    mib = parse_sizes(sizes) if sizes is not None else []
    base = o.open_recipe(o.DEFAULT_RECIPE)
    if runner is None:
        wanted = {label_of(size): size for size in mib}
        shares = shares_of(common.open(), chosen, base) if budget_mib is not None else {}
        share = {one: {label: (budget_mib or 0) * part} for one, part in shares.items()}
        return [point for one in chosen for point in unplanned(one, base, wanted | share.get(one, {}))]
    if not mib and budget_mib is None:
        return []
    known = {one: measured(common, one, "fp16", runner) for one in chosen}
    found = [point for one in chosen for point in of_sizes(common.open(), one, base, known[one], mib)]
    if budget_mib is not None:
        found += _within(common, o.open_recipe(BUDGET_RECIPE), known, budget_mib, label)
    return found


def _within(
    common: "Common", base: "Recipe", known: "Mapping[Component, Sensitivity]", budget_mib: float, label: str
) -> "list[Point]":
    from sa3_convert.cli.console import progress
    from sa3_convert.lab.sweep.budget import within
    from sa3_convert.lab.sweep.harm import harms
    from sa3_convert.lab.sweep.points import of_plans

    with progress("listening") as tick:
        heard = harms(
            common.open(), common.loras, known, common.cache, lambda *done: tick("listening", *done), common.threads
        )
    bases = {component: base.for_component(component) for component in known}
    return of_plans(within(common.open(), bases, known, heard, round(budget_mib * 2**20)), label)
