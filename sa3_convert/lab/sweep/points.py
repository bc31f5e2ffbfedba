"""The points of a sweep: what a component is converted by."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sa3_convert.components import Component
from sa3_convert.convert.plan import estimate_model_bytes
from sa3_convert.errors import UsageError
from sa3_convert.recipe import ComponentRecipe, Recipe

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint
    from sa3_convert.lab.planner.planner import BitPlan
    from sa3_convert.lab.planner.sensitivity import Sensitivity

ANY_FIDELITY: Final = 0.001
"""The floor, in dB, of what is measured in order to know how bad it is; below it there is no signal left."""
MOST_POINTS: Final = 1000
_RANGE: Final = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Point:
    """One component by one recipe."""

    name: str
    component: Component
    recipe: ComponentRecipe
    predicted_db: float | None = None
    """Mean over inputs, of what was planned."""
    predicted_bytes: int | None = None
    problem: str = ""
    """Why it cannot be had."""

    @property
    def planned(self) -> bool:
        """Whether its recipe is known; else it stands for what a plan will take."""
        return self.predicted_bytes is None or self.predicted_db is not None


def parse_sizes(text: str) -> list[float]:
    """Return the sizes in MiB of FROM:TO:STEP, both ends among them, or of single ones with commas between.

    Raises:
        UsageError: it is neither, or has no point, or too many.

    """
    if found := _RANGE.fullmatch(text):
        first, last, step = map(float, found.groups())
        # Beyond that are numbers that a division makes infinite.
        count = int(min((last - first) / step + 1e-9, MOST_POINTS)) + 1 if step and max(first, last) < 1e6 else 0
        sizes = [first + number * step for number in range(min(count, MOST_POINTS + 1))]
    else:
        try:
            sizes = [float(part) for part in text.split(",")]
        except ValueError:
            sizes = []
    if not sizes or len(sizes) > MOST_POINTS or not all(0 < size < 1e6 for size in sizes):
        raise UsageError(
            f"--sizes takes FROM:TO:STEP, as 200:450:25, or 200,300: sizes in MiB, at most {MOST_POINTS}; not {text!r}."
        )
    return sizes


def label_of(size: float) -> str:
    """Return what a size in MiB is called in names of points and recipes, which have no +."""
    return f"{size:.10g}"


def of_sizes(
    checkpoint: "Checkpoint", component: Component, base: Recipe, sensitivity: "Sensitivity", sizes: Iterable[float]
) -> list[Point]:
    """Return the best plan for each size in MiB; one that no plan fits into says so."""
    from sa3_convert.lab.planner.planner import Target, plan_component

    points, fixed_error = [], None
    for size in sizes:
        name = f"{component.value}-{label_of(size)}"
        own = base.for_component(component)
        try:
            target = Target(size=round(size * 2**20))
            made = plan_component(checkpoint, component, own, sensitivity, target, fixed_error=fixed_error)
        except UsageError as error:
            points.append(Point(name, component, own, problem=str(error)))
        else:
            fixed_error = made.fixed_error
            points.append(Point(name, component, _measured(made.recipe), made.predicted_db, made.size))
    return points


def of_plans(plans: "Mapping[Component, BitPlan]", label: str) -> list[Point]:
    """Return one point of each component's plan."""
    return [
        Point(f"{component.value}-{label}", component, _measured(made.recipe), made.predicted_db, made.size)
        for component, made in plans.items()
    ]


def of_recipes(recipes: Sequence[Recipe], components: Sequence[Component]) -> list[Point]:
    """Return every component by every recipe."""
    return [
        Point(f"{component.value}-{recipe.name}", component, _measured(recipe.for_component(component)))
        for component in components
        for recipe in recipes
    ]


def _measured(recipe: ComponentRecipe) -> ComponentRecipe:
    return recipe.model_copy(update={"floor_db": ANY_FIDELITY})


def unplanned(component: Component, base: Recipe, sizes: Mapping[str, float]) -> list[Point]:
    """Return sizes in MiB that nothing was measured for: each takes what the recipe takes that plans begin with."""
    own = _measured(base.for_component(component))
    return [
        Point(f"{component.value}-{label}", component, own, predicted_bytes=round(size * 2**20))
        for label, size in sizes.items()
    ]


def shares_of(checkpoint: "Checkpoint", components: Sequence[Component], recipe: Recipe) -> dict[Component, float]:
    """Return the share of each component in the bytes of all of them by a recipe."""
    sizes = {
        component: estimate_model_bytes(
            {name: entry.shape for name, entry in checkpoint.stored(component).items()}, recipe.for_component(component)
        )
        for component in components
    }
    return {component: size / sum(sizes.values()) for component, size in sizes.items()}


def of_own_names(points: list[Point]) -> list[Point]:
    """Return points none of which is called as another is; else UsageError."""
    names = [point.name for point in points]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(
            f"{twice[0]} would be there twice: of two sizes, or two recipes of one name. Give one of them."
        )
    return points
