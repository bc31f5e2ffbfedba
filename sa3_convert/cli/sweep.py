"""`sweep`: many recipes of one checkpoint, and which are worth keeping."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Exit, Option

from sa3_convert.cli import options as o
from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo
from sa3_convert.components import Component
from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint
    from sa3_convert.lab.sweep.points import Point
    from sa3_convert.lab.sweep.sweep import Runner
    from sa3_convert.lab.sweep.tasks import Task

FIGURES = "sweep.json"
OutOption = Annotated[Path, Option(metavar="DIR", help="Gets sweep.json, a page, and recipes.", callback=paths.makes)]
SizesOption = Annotated[
    str | None, Option(metavar="FROM:TO:STEP", help="Plan one component for these sizes in MiB; or 200,300.")
]
RecipesOption = Annotated[
    list[Path] | None, Option("--recipe", help="Try this recipe (repeatable).", callback=paths.reads)
]
WorkersOption = Annotated[int | None, Option(min=1, max=256, help="Run on so many processes of this machine.")]
SchedulerOption = Annotated[
    str | None, Option(metavar="ADDRESS", help="Run on the workers of this Dask scheduler, tcp://HOST:8786.")
]
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
    lora: o.LoraOption = None,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    cache: Annotated[Path | None, Option(metavar="DIR", help="Where stages are kept; beside --out.")] = None,
    store: StoreOption = "",
    dry_run: Annotated[bool, Option("--dry-run", help="Say what each point takes, and stop.")] = False,
    json_file: o.JsonOption = None,
    threads: o.ThreadsOption = None,
) -> None:
    """Find the recipes that are best for their size.

    Each is converted and measured. What is done stays done: the same command again does only what is missing.
    """
    if sizes is None and not recipe:
        raise UsageError("Give --sizes FROM:TO:STEP with one --component, or --recipe.")
    if sizes is not None and len(component or ()) != 1:
        raise UsageError("--sizes are of one component. Name it: --component dit.")
    if workers and scheduler:
        raise UsageError("--workers starts workers here, --scheduler takes those of a scheduler. Give one of them.")
    if out.is_dir() and any(out.iterdir()) and not (out / FIGURES).is_file():
        raise UsageError(f"{out} holds something else than a sweep. Name a folder that is empty or not there.")
    from sa3_convert.cli.console import progress, stdout, sweep_plan_table, sweep_table
    from sa3_convert.lab.sweep.store import Store
    from sa3_convert.lab.sweep.sweep import run_sweep, write
    from sa3_convert.lab.sweep.tasks import Common, tasks_for, to_do

    if store:
        Store(store)
    opened = o.open_checkpoint(checkpoint, lora)
    folder = o.cache_of(cache, out).absolute()
    points = _points(opened, component, sizes, recipe, folder, threads, measure=not dry_run)
    common = Common(
        opened.folder.absolute(), folder, tuple(str(Path(text).absolute()) for text in lora or ()), store, threads
    )
    if dry_run:
        tasks = to_do(points, tasks_for([point for point in points if not point.problem], common))
        stdout.print(sweep_plan_table(points, tasks, folder))
        _tell_time([task for own in tasks.values() for task in own], workers or 1)
        return
    runner = _runner(workers, scheduler)
    with progress(f"{len(points)} points") as tick:
        found = run_sweep(common, points, runner, lambda _, __, done, of: tick(f"{len(points)} points", done, of))
    out.mkdir(parents=True, exist_ok=True)
    write(found, points, o.open_recipe(o.DEFAULT_RECIPE), out)
    for file in (out / FIGURES, json_file):
        o.write_figures(file, found.model_dump(mode="json"))
    stdout.print(sweep_table(found))
    if found.mixed:
        echo("Points come from several kinds of processor or versions of MNN, which differ a little: see the page.")
    echo(f"Page: {out / 'index.html'}")
    for point in found.missing:
        echo(f"{point.name} is missing: {point.problem}", err=True)
    if found.missing:
        raise Exit(max(point.exit_code for point in found.missing))


def _tell_time(tasks: "Sequence[Task]", workers: int) -> None:
    from sa3_convert.lab.sweep.scheduling import simulated

    found = simulated(tasks, workers)
    echo(
        f"On {workers} worker{'s'[: workers > 1]} about {found.seconds / 60:.1f} min, {found.efficiency:.0%} of it "
        f"at work; tasks that follow one another take {found.longest_chain / 60:.1f} min on any number of them."
    )


def _points(
    checkpoint: "Checkpoint",
    component: Sequence[Component] | None,
    sizes: str | None,
    recipes: Sequence[Path] | None,
    cache: Path,
    threads: int | None,
    *,
    measure: bool,
) -> "list[Point]":
    """Return what is to be tried; sizes are planned, unless nothing may be measured for it."""
    from sa3_convert.cli.console import progress
    from sa3_convert.convert.plan import chosen_components
    from sa3_convert.lab.sweep.points import of_own_names, of_recipes, of_sizes, parse_sizes, unplanned

    chosen = chosen_components(checkpoint.layout, component or ())
    found = of_recipes([o.open_recipe(recipe) for recipe in recipes or ()], chosen)
    if sizes is not None and component:
        mib, base, one = parse_sizes(sizes), o.open_recipe(o.DEFAULT_RECIPE), component[0]
        if not measure:
            return of_own_names(found + unplanned(one, base, mib))
        from sa3_convert.lab.planner.planner import measure as measure_layers

        with progress(f"{one.value}: preparing") as tick:
            known = measure_layers(
                checkpoint, one, "fp16", cache, lambda what, done, of: tick(f"{one.value}: {what}", done, of), threads
            )
        found += of_sizes(checkpoint, one, base, known, mib)
    return of_own_names(found)


def _runner(workers: int | None, scheduler: str | None) -> "Runner":
    from functools import partial

    from sa3_convert.lab.sweep import scheduling as s

    if workers is None and scheduler is None:
        return s.in_this_process
    tell = partial(echo, err=True)
    connect = s.scheduler(scheduler, tell) if scheduler else s.local_workers(workers or 1, tell)
    return partial(s.on_dask, connect)
