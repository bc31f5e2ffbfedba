"""The bytes of a budget, shared among all components at once by what hurts the end result."""

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

_TABLES: Final[tuple[EmbeddingType, ...]] = ("float", "int8", "int4")
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

    @property
    def least(self) -> int:
        return self.fixed + sum(min(choice.size for choice in choices) for choices in self.options.values())

    def pinned(self) -> Allocation:
        """Return the smallest choice whose error may be."""
        return smallest_for_error(self.options, MOST_ERROR - self.spent)


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
    found: list[tuple[float, dict[Component, int], Mapping[Component, ComponentRecipe]]] = []
    problem = UsageError("There is nothing to plan.")
    for table in _TABLES if Component.TEXT_ENCODER in bases else _TABLES[:1]:
        recipes = dict(bases)
        if text := recipes.get(Component.TEXT_ENCODER):
            recipes[Component.TEXT_ENCODER] = text.model_copy(update={"embedding": table})
        parts = {one: _part(checkpoint, one, recipe, sensitivities[one]) for one, recipe in recipes.items()}
        try:
            found.append((*_shared(parts, harms, size), recipes))
        except UsageError as error:
            problem = error
    if not found:
        raise problem
    _, sizes, chosen = min(found, key=lambda one: one[0])
    return {
        one: plan_component(checkpoint, one, recipe, sensitivities[one], Target(size=sizes[one]))
        for one, recipe in chosen.items()
    }


def _part(checkpoint: "Checkpoint", component: Component, recipe: ComponentRecipe, sensitivity: Sensitivity) -> _Part:
    spent = table_error(checkpoint, recipe) if component is Component.TEXT_ENCODER else 0.0
    groups = layers_by_pattern(sensitivity.layers, "layer")
    options = options_by_pattern(groups, sensitivity, recipe)
    return _Part(bytes_beside(checkpoint, component, recipe), spent, options)


def _shared(
    parts: Mapping[Component, _Part], harms: Mapping[Component, float], size: int
) -> tuple[float, dict[Component, int]]:
    """Return the least harm of all layers together, and the bytes that each component then has.

    A component that would have more than `MOST_ERROR` gets what it needs for that, and the others share the rest.
    """
    least = sum(part.least for part in parts.values())
    if size < least:
        raise UsageError(
            f"No plans for {', '.join(parts)} are together smaller than {least / 2**20:.2f} MiB; "
            f"{size / 2**20:.2f} MiB were asked for."
        )
    chosen: dict[Component, Allocation] = {}
    while True:
        free = {one: part for one, part in parts.items() if one not in chosen}
        left = size - sum(part.fixed for part in parts.values()) - sum(made.size for made in chosen.values())
        shares = _divided(free, harms, left) if free else {}
        short = [one for one, made in shares.items() if parts[one].spent + made.error > MOST_ERROR]
        if not short:
            break
        chosen |= {one: parts[one].pinned() for one in short}
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
        own = {layer: made.chosen[f"{one.value} {layer}"] for layer in part.options}
        error = sum(option.error for option in own.values()) / harms[one]
        divided[one] = Allocation(own, sum(option.size for option in own.values()), error, 0.0)
    return divided
