"""A sweep from its points to what is kept of it: measured, judged, written down whole."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from sa3_convert.lab.common import Common
from sa3_convert.lab.planner.measuring import layers_to_measure
from sa3_convert.lab.report.theme import standalone
from sa3_convert.lab.sweep.page import frontier_figure, page
from sa3_convert.lab.sweep.points import ANY_FIDELITY, Point
from sa3_convert.lab.sweep.result import Measured, Sweep, sweep_of
from sa3_convert.lab.sweep.tasks import Ran, Task, run_task, tasks_for
from sa3_convert.recipe import Recipe
from sa3_convert.scheduling import Runner, in_this_process
from sa3_convert.system.files import write_text

MARGIN_DB = 2.0
"""A floor is so much below what was measured: another processor adds in another order."""

Report = Callable[[Task, Ran, int, int], None]
"""(what ran, what came of it, how many are done, of how many)."""


def run_sweep(
    common: Common,
    points: Sequence[Point],
    runner: Runner = in_this_process,
    report: Report = lambda task, ran, done, of: None,
) -> Sweep:
    """Convert and measure every point that can be had."""
    checkpoint = common.open()
    tasks = tasks_for([point for point in points if not point.problem], common)
    different = list({task.name: task for own in tasks.values() for task in own}.values())
    ran: dict[str, Ran] = {}
    with contextlib.closing(runner(different, run_task)) as outcomes:
        for task, outcome in outcomes:
            ran[task.name] = outcome if isinstance(outcome, Ran) else Ran.lost(outcome)
            report(task, ran[task.name], len(ran), len(different))
    layers = {point.component: list(layers_to_measure(checkpoint, point.component)) for point in points}
    return sweep_of(checkpoint.folder.name, checkpoint.variant_name, points, layers, tasks, ran)


def write(sweep: Sweep, points: Sequence[Point], base: Recipe, out: Path) -> None:
    """Write what a sweep found into a folder: recipes on the frontier, the page, and a picture of each component's."""
    by_name = {point.name: point for point in points}
    for found in sweep.points:
        if found.recipe is not None:
            write_text(out / found.recipe, recipe_of(found, by_name[found.name], base).to_yaml())
    for component, points_of in sweep.had.items():
        figure = frontier_figure(points_of, component.value)
        write_text(out / f"{component.value}.svg", standalone(figure))
    write_text(out / "index.html", page(sweep))


def whole_recipe(sweep: Sweep, points: Sequence[Point], base: Recipe, label: str) -> Recipe | None:
    """Return one recipe of all points that have a label; None if there are none, or one of them is missing."""
    by_name = {point.name: point for point in points}
    own = [found for found in sweep.points if found.name == f"{found.component.value}-{label}"]
    if not own or any(found.problem for found in own):
        return None
    parts = {f.component: recipe_of(f, by_name[f.name], base).for_component(f.component) for f in own}
    size = sum(found.bytes or 0 for found in own) / 2**20
    changed = {
        "name": label,
        "description": f"Of a sweep: {size:.1f} MiB, shared by what hurts the end result.",
        "components": dict(base.components) | parts,
    }
    return base.model_copy(update=changed)


def recipe_of(found: Measured, point: Point, base: Recipe) -> Recipe:
    """Return a point as a recipe with its own floor; other components are as in `base`."""
    assert found.fidelity is not None
    floor = max(ANY_FIDELITY, round(found.fidelity.signal_to_noise_db - MARGIN_DB, 1))
    own = point.recipe.model_copy(update={"floor_db": floor})
    worst = found.fidelity.signal_to_noise_db
    changed = {
        "name": point.name.replace("_", "-"),
        "description": f"Of a sweep: {point.component.value} in {(found.bytes or 0) / 2**20:.1f} MiB, {worst:.1f} dB.",
        "components": dict(base.components) | {point.component: own},
    }
    return base.model_copy(update=changed)
