"""The bytes of a budget, shared among all components at once by what hurts the end result."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.planner.allocation import Option, allocate
from sa3_convert.lab.planner.planner import (
    BitPlan,
    Target,
    bytes_beside,
    layers_by_pattern,
    options_by_pattern,
    plan_component,
    table_error,
)
from sa3_convert.lab.planner.sensitivity import Sensitivity
from sa3_convert.recipe import ComponentRecipe, EmbeddingType

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

_TABLES: Final[tuple[EmbeddingType, ...]] = ("float", "int8", "int4")


def within(
    checkpoint: "Checkpoint",
    bases: Mapping[Component, ComponentRecipe],
    sensitivities: Mapping[Component, Sensitivity],
    harms: Mapping[Component, float],
    size: int,
) -> dict[Component, BitPlan]:
    """Return a plan of each component, together at most `size` bytes, that hurt the end result least.

    What a layer's error costs is the predicted error at its component's output times what such an error was measured
    to do to the end result; of the token table every type is tried.

    Raises:
        UsageError: no plan is so small.

    """
    found: list[tuple[float, dict[Component, int], dict[Component, ComponentRecipe]]] = []
    problem = UsageError("There is nothing to plan.")
    for table in _TABLES if Component.TEXT_ENCODER in bases else _TABLES[:1]:
        recipes = dict(bases)
        fixed_harm = 0.0
        if text := recipes.get(Component.TEXT_ENCODER):
            recipes[Component.TEXT_ENCODER] = text.model_copy(update={"embedding": table})
            fixed_harm = harms[Component.TEXT_ENCODER] * table_error(checkpoint, recipes[Component.TEXT_ENCODER])
        try:
            harm, sizes = _shared(checkpoint, recipes, sensitivities, harms, size)
        except UsageError as error:
            problem = error
        else:
            found.append((fixed_harm + harm, sizes, recipes))
    if not found:
        raise problem
    _, sizes, recipes = min(found, key=lambda one: one[0])
    return {
        component: plan_component(
            checkpoint, component, recipes[component], sensitivities[component], Target(size=sizes[component])
        )
        for component in bases
    }


def _shared(
    checkpoint: "Checkpoint",
    recipes: Mapping[Component, ComponentRecipe],
    sensitivities: Mapping[Component, Sensitivity],
    harms: Mapping[Component, float],
    size: int,
) -> tuple[float, dict[Component, int]]:
    """Return the least harm of all layers together, and the bytes that each component then has."""
    sizes = {component: bytes_beside(checkpoint, component, recipe) for component, recipe in recipes.items()}
    options: dict[str, list[Option]] = {}
    owner: dict[str, Component] = {}
    for component, recipe in recipes.items():
        groups = layers_by_pattern(sensitivities[component].layers, "layer")
        for pattern, choices in options_by_pattern(groups, sensitivities[component], recipe).items():
            name = f"{component.value} {pattern}"
            owner[name] = component
            options[name] = [replace(choice, error=choice.error * harms[component]) for choice in choices]
    least = sum(sizes.values()) + sum(min(choice.size for choice in choices) for choices in options.values())
    if size < least:
        raise UsageError(
            f"No plans for {', '.join(sizes)} are together smaller than {least / 2**20:.2f} MiB; "
            f"{size / 2**20:.2f} MiB were asked for."
        )
    made = allocate(options, size - sum(sizes.values()))
    for name, option in made.chosen.items():
        sizes[owner[name]] += option.size
    return made.error, sizes
