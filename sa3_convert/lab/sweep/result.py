"""What a sweep found: the points, which of them are worth keeping, and what is missing.

`docs/sweep.schema.json` is the JSON schema of `Sweep`, which is what `sweep.json` holds.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from sa3_convert.bundle.manifest import Fidelity
from sa3_convert.check.results import Data
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.sweep.points import Point
from sa3_convert.lab.sweep.tasks import Ran, Task


class Whole(Data):
    """What came of whole generations with a point's model, the other components by one recipe."""

    worst_db: float
    """Worst signal-to-noise ratio of the point's component, given what the reference gives it, over all generations."""
    worst_case: str
    """Where that was."""
    spectra_db: float
    """Mean spectral distance from prompt to audio, from the reference's."""
    chaos_db: float
    """The same of the reference itself, its noise nudged."""
    latent_cosine: float
    """Mean cosine of the latents at the end."""
    others: str
    """The recipe of the other components."""
    recognised: int | None = None
    """Of the miniature: how many of its prompts are recognised in what the bundle makes."""


class Measured(Data):
    """One component by one recipe."""

    name: str
    component: Component
    bytes: int | None = None
    """Of the model; None where the point is missing."""
    fidelity: Fidelity | None = None
    """The worst of the inputs that a conversion compares."""
    predicted_bytes: int | None = None
    predicted_db: float | None = None
    """Mean over inputs, of what was planned by measured sensitivities."""
    generations: Whole | None = None
    """Where they were asked for."""
    on_frontier: bool = False
    """Whether no other point of its component is at least as small and as good."""
    recipe: str | None = None
    """The file that makes it, beside this one."""
    bits: Mapping[str, int] = {}
    """Of each layer's weights; floating point has 16."""
    seconds: float = 0.0
    """That its stages took, without those that the cache had."""
    processor: str = ""
    mnn: str = ""
    problem: str = ""
    """Why it is missing."""
    exit_code: int = 0
    """The kind of problem, as commands end with it."""


class Sweep(Data):
    """All points, in the order in which they were asked for."""

    schema_version: Literal[1] = Field(1, alias="schema")
    checkpoint: str
    """The name of its folder."""
    variant: str
    points: tuple[Measured, ...]
    mixed: bool
    """Whether points come from more than one kind of processor or version of MNN: these differ a little."""

    @property
    def had(self) -> dict[Component, list[Measured]]:
        """The points that are not missing, by component."""
        found: dict[Component, list[Measured]] = {}
        for point in self.points:
            if not point.problem:
                found.setdefault(point.component, []).append(point)
        return found

    @property
    def generated(self) -> bool:
        """Whether points went through whole generations."""
        return any(point.generations is not None for point in self.points)

    @property
    def recognises(self) -> bool:
        """Whether sounds in them were counted, as they are of the miniature."""
        return any(point.generations is not None and point.generations.recognised is not None for point in self.points)

    @property
    def missing(self) -> list[Measured]:
        """The points that could not be had."""
        return [point for point in self.points if point.problem]


def sweep_of(
    checkpoint: str,
    variant: str,
    points: Sequence[Point],
    layers: Mapping[Component, Sequence[str]],
    tasks: Mapping[str, Sequence[Task]],
    ran: Mapping[str, Ran],
) -> Sweep:
    """Return what is known of each point."""
    found = [
        _measured(point, layers[point.component], [ran[task.name] for task in tasks.get(point.name, ())])
        for point in points
    ]
    places = {(point.processor, point.mnn) for point in found if not point.problem}
    return Sweep(checkpoint=checkpoint, variant=variant, points=with_frontier(found), mixed=len(places) > 1)


def with_frontier(points: Sequence[Measured]) -> tuple[Measured, ...]:
    """Return points that say whether they are worth keeping, and the file that makes those."""
    best = frontier(points)
    places = {name: {"on_frontier": True, "recipe": f"{name}.yaml"} for name in best}
    neither = {"on_frontier": False, "recipe": None}
    return tuple(point.model_copy(update=places.get(point.name, neither)) for point in points)


def _measured(point: Point, layers: Sequence[str], ran: Sequence[Ran]) -> Measured:
    scheme = point.recipe.weights
    known = Measured(
        name=point.name,
        component=point.component,
        predicted_bytes=point.predicted_bytes,
        predicted_db=point.predicted_db,
        bits={layer: (scheme.for_layer(layer)[0] if scheme else None) or 16 for layer in layers},
        problem=point.problem,
        exit_code=UsageError.exit_code if point.problem else 0,
    )
    if not ran:
        return known
    judged = ran[-1]
    place = {"seconds": sum(one.seconds for one in ran), "processor": judged.processor, "mnn": judged.mnn}
    kept = ("problem", "exit_code") if judged.problem else ("bytes", "fidelity")
    result = {name: getattr(judged, name) for name in kept}
    return known.model_copy(update=place | result)


def frontier(points: Sequence[Measured]) -> set[str]:
    """Return the names of points that no other one of their component beats: at least as small, at least as good."""
    best: set[str] = set()
    reached: dict[Component, float] = {}
    had = [(p.bytes, -p.fidelity.signal_to_noise_db, p) for p in points if p.bytes and p.fidelity and not p.problem]
    for _, worse, point in sorted(had, key=lambda one: one[:2]):
        if -worse > reached.get(point.component, float("-inf")):
            reached[point.component] = -worse
            best.add(point.name)
    return best
