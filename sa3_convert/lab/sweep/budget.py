"""The bytes of a budget, shared among all components at once by what hurts the end result."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.planner.allocation import Allocation, Option, allocate, smallest_for_error
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

_TABLES: Final[tuple[EmbeddingType, ...]] = ("int4", "int8", "float")
MOST_ERROR: Final = 0.1
"""Share of a component's output that may be error, 10 dB: what more does to the end result does not follow from what
little does, which was measured."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One component, and what its layers can be."""

    fixed: int
    """Bytes that are not a layer's."""
    spent: float
    """The error that its token table causes, as a share of the output's energy."""
    options: Mapping[str, Sequence[Option]]
    smallest: Allocation
    """Of the choices whose error may be."""

    @property
    def least(self) -> int:
        return self.fixed + self.smallest.size


def within(
    checkpoint: "Checkpoint",
    bases: Mapping[Component, ComponentRecipe],
    sensitivities: Mapping[Component, Sensitivity],
    harms: Mapping[Component, float],
    size: int,
) -> dict[Component, BitPlan]:
    """Return a plan of each component, together at most `size` bytes, that hurt the end result least.

    What a layer's error costs is the predicted error at its component's output times what such an error was measured
    to do to the end result; of the token table every type is tried. No component's error is more than `MOST_ERROR`.

    Raises:
        UsageError: no plan is so small.

    """
    possible: list[tuple[dict[Component, ComponentRecipe], dict[Component, _Part]]] = []
    problem = UsageError("There is nothing to plan.")
    # What the last one says is of the table that causes no error.
    for table in _TABLES if Component.TEXT_ENCODER in bases else _TABLES[-1:]:
        recipes = dict(bases)
        if text := recipes.get(Component.TEXT_ENCODER):
            recipes[Component.TEXT_ENCODER] = text.model_copy(update={"embedding": table})
        try:
            parts = {one: _part(checkpoint, one, recipe, sensitivities[one]) for one, recipe in recipes.items()}
        except UsageError as error:
            problem = error
        else:
            possible.append((recipes, parts))
    if not possible:
        raise problem
    least = min(_least(parts) for _, parts in possible)
    if size < least:
        raise UsageError(
            f"No plans for {', '.join(bases)} are together smaller than {least / 2**20:.2f} MiB, none of them below "
            f"{-10 * math.log10(MOST_ERROR):.0f} dB; {size / 2**20:.2f} MiB were asked for."
        )
    found = [(*_shared(parts, harms, size), recipes, parts) for recipes, parts in possible if _least(parts) <= size]
    _, sizes, chosen, of = min(found, key=lambda one: one[0])
    return {
        one: plan_component(
            checkpoint, one, recipe, sensitivities[one], Target(size=sizes[one]), fixed_error=of[one].spent
        )
        for one, recipe in chosen.items()
    }


def _part(checkpoint: "Checkpoint", component: Component, recipe: ComponentRecipe, sensitivity: Sensitivity) -> _Part:
    spent = table_error(checkpoint, recipe) if component is Component.TEXT_ENCODER else 0.0
    groups = layers_by_pattern(sensitivity.layers, "layer")
    options = options_by_pattern(groups, sensitivity, recipe)
    smallest = smallest_for_error(options, MOST_ERROR - spent)
    return _Part(bytes_beside(checkpoint, component, recipe), spent, options, smallest)


def _least(parts: Mapping[Component, _Part]) -> int:
    return sum(part.least for part in parts.values())


def _shared(
    parts: Mapping[Component, _Part], harms: Mapping[Component, float], size: int
) -> tuple[float, dict[Component, int]]:
    """Return the least harm of all layers together, and the bytes that each component then has.

    A component that would have more than `MOST_ERROR` gets what it needs for that, and the others share the rest:
    `size` is enough for all of them to have no more.
    """
    chosen: dict[Component, Allocation] = {}
    while True:
        free = {one: part for one, part in parts.items() if one not in chosen}
        left = size - sum(part.fixed for part in parts.values()) - sum(made.size for made in chosen.values())
        shares = _divided(free, harms, left) if free else {}
        short = [one for one, made in shares.items() if parts[one].spent + made.error > MOST_ERROR]
        if not short:
            break
        chosen |= {one: parts[one].smallest for one in short}
    chosen |= shares
    harm = sum(harms[one] * (parts[one].spent + made.error) for one, made in chosen.items())
    return harm, {one: parts[one].fixed + made.size for one, made in chosen.items()}


def _divided(
    parts: Mapping[Component, _Part], harms: Mapping[Component, float], size: int
) -> dict[Component, Allocation]:
    """Return one option for each layer of all components, that together do least harm."""
    options = {
        f"{one.value} {layer}": [replace(choice, error=choice.error * harms[one]) for choice in choices]
        for one, part in parts.items()
        for layer, choices in part.options.items()
    }
    made = allocate(options, size)
    divided = {}
    for one, part in parts.items():
        own = {
            # Their own errors: what does no harm, whatever its error, has no way back from none.
            layer: choices[options[f"{one.value} {layer}"].index(made.chosen[f"{one.value} {layer}"])]
            for layer, choices in part.options.items()
        }
        size, error = (sum(getattr(option, what) for option in own.values()) for what in ("size", "error"))
        divided[one] = Allocation(own, size, error, 0.0)
    return divided
