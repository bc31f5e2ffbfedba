"""Each component over real generations: prompts × seeds × durations, each step, the worst case by name."""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from pydantic.dataclasses import dataclass

from sa3_convert.check.inputs import Region, text_regions
from sa3_convert.check.metrics import Fidelity, compare
from sa3_convert.check.results import FINITE, Decibels, Figures, Progress, Spread, reference_stage
from sa3_convert.components import Component
from sa3_convert.errors import VerificationError
from sa3_convert.lab.generations.trajectory import GenerationCase, StagedPipeline, Trajectory


class Observation(Figures):
    """One comparison within a generation."""

    case: str
    step: int | None = None
    """Of the denoising loop, counted from 0."""

    def __init__(self, case: str, fidelity: Fidelity | None = None, step: int | None = None, **figures: float) -> None:
        if fidelity is not None:
            figures |= asdict(fidelity)
        BaseModel.__init__(self, case=case, step=step, **figures)


class Distribution(Spread):
    """All observations of one quantity; there is at least one."""

    name: str
    worst_case: str
    worst_step: int | None
    by_step: Mapping[int, Decibels]
    """The mean ratio of each denoising step; empty for what has no steps."""
    observations: tuple[Observation, ...]

    def __init__(self, name: str, observations: Sequence[Observation]) -> None:
        if not observations:
            raise VerificationError(f"{name}: nothing was compared.")
        worst = min(observations, key=lambda o: o.signal_to_noise_db)
        BaseModel.__init__(
            self,
            name=name,
            worst_case=worst.case,
            worst_step=worst.step,
            by_step={step: float(np.mean(ratios)) for step, ratios in ratios_by_step(observations).items()},
            observations=tuple(observations),
            **Spread.of([o.signal_to_noise_db for o in observations]).model_dump(),
        )

    @property
    def place(self) -> str:
        """The worst case, with its step."""
        return self.worst_case + ("" if self.worst_step is None else f" step={self.worst_step}")


def ratios_by_step(observations: Sequence[Observation]) -> dict[int, list[float]]:
    """Return the ratios of each denoising step, in order."""
    steps = sorted({o.step for o in observations if o.step is not None})
    return {step: [o.signal_to_noise_db for o in observations if o.step == step] for step in steps}


TEACHER_FORCED = "dit, teacher-forced"
FREE_RUNNING = "dit, free-running"


@dataclass(frozen=True, config=FINITE)
class GenerationFidelity:
    """The distributions of all components."""

    steps: int
    """Of the denoising loop."""
    distributions: tuple[Distribution, ...]

    def of(self, name: str) -> Distribution:
        """Return a distribution by name."""
        return next(d for d in self.distributions if d.name == name)


def measure_components(
    references: StagedPipeline,
    target: StagedPipeline,
    cases: Sequence[GenerationCase],
    report: Progress = lambda what, done, total: None,
    *,
    components: Collection[Component] = tuple(Component),
) -> GenerationFidelity:
    """Measure every component that the target has.

    The references of a stage are computed, or fetched, before the target's first model is loaded; one model of either
    side is in memory at a time. Raises VerificationError if there are no cases, or an output cannot be compared.
    """
    if not cases:
        raise VerificationError("There are no cases to generate.")
    wanted = [c for c in target.bundle.components if c in components]
    _prepare(references, wanted, cases, report)
    if Component.DIT in wanted:
        target.embed(cases)
    found = []
    for quantity in (quantity for quantity in QUANTITIES if quantity.component in wanted):
        distinct = quantity.distinct(cases)
        observations: list[Observation] = []
        for done, case in enumerate(distinct):
            report(quantity.name, done, len(distinct))
            observations += quantity.observe(references, target, case)
        found.append(Distribution(quantity.name, tuple(observations)))
    target.close()
    return GenerationFidelity(references.steps, tuple(found))


def _prepare(
    references: StagedPipeline, wanted: Collection[Component], cases: Sequence[GenerationCase], report: Progress
) -> None:
    """Have the references computed, model by model: each stage builds on those before."""
    order = list(Component)
    last = max((order.index(component) for component in wanted), default=-1)
    for component in order[: last + 1]:
        for done, case in enumerate(cases):
            report(reference_stage(component), done, len(cases))
            reference_of(references, component)(case)
    references.close()


def reference_of(references: StagedPipeline, component: Component) -> Callable[[GenerationCase], object]:
    """Return what computes the reference of a component in a case, those of the components before it being there."""
    stages: dict[Component, Callable[[GenerationCase], object]] = {
        Component.TEXT_ENCODER: references.prompt_embedding,
        Component.NUMBER_CONDITIONER: references.seconds_embedding,
        Component.DIT: references.trajectory,
        Component.DECODER: references.audio,
        Component.ENCODER: references.latents,
    }
    return stages[component]


def _text_encoder(references: StagedPipeline, target: StagedPipeline, case: GenerationCase) -> Iterator[Observation]:
    expected, actual = references.prompt_embedding(case), target.prompt_embedding(case)
    count = int(target.tokens(case).mask.sum())
    # The prompt alone; an empty one has nothing but padding.
    region = text_regions(count, expected.shape[1])[0]
    yield _observed(case, region, expected, actual)


def _number_conditioner(
    references: StagedPipeline, target: StagedPipeline, case: GenerationCase
) -> Iterator[Observation]:
    yield _observed(case, Region(), references.seconds_embedding(case), target.seconds_embedding(case))


def _teacher_forced(references: StagedPipeline, target: StagedPipeline, case: GenerationCase) -> Iterator[Observation]:
    path = references.trajectory(case)
    with target.velocity(case, references.conditioning(case)) as velocity:
        for step, (x, t, expected) in enumerate(zip(path.inputs, path.times, path.velocities, strict=True)):
            yield _observed(case, _valid(path), expected, velocity(x, t), step)


def _free_running(references: StagedPipeline, target: StagedPipeline, case: GenerationCase) -> Iterator[Observation]:
    path, free = references.trajectory(case), target.trajectory(case)
    for step, (expected, actual) in enumerate(zip(path.latents, free.latents, strict=True)):
        yield _observed(case, _valid(path), expected, actual, step)


def _decoder(references: StagedPipeline, target: StagedPipeline, case: GenerationCase) -> Iterator[Observation]:
    actual = target.decoded(case, references.trajectory(case).result)
    yield _observed(case, Region(), references.audio(case), actual)


def _encoder(references: StagedPipeline, target: StagedPipeline, case: GenerationCase) -> Iterator[Observation]:
    actual = target.encoded(references.audio(case))
    yield _observed(case, Region(), references.latents(case), actual)


@dataclass(frozen=True, slots=True)
class Quantity:
    """How one distribution is measured."""

    name: str
    component: Component
    observe: Callable[[StagedPipeline, StagedPipeline, GenerationCase], Iterator[Observation]]
    key: Callable[[GenerationCase], Hashable] = lambda case: case
    """Cases with the same one are the same to the component."""

    def distinct(self, cases: Sequence[GenerationCase]) -> tuple[GenerationCase, ...]:
        """Return one case, the first, for all that are the same to the component."""
        return tuple({self.key(case): case for case in reversed(cases)}.values())[::-1]


QUANTITIES = (
    Quantity("text_encoder", Component.TEXT_ENCODER, _text_encoder, lambda case: case.text),
    Quantity("number_conditioner", Component.NUMBER_CONDITIONER, _number_conditioner, lambda case: case.seconds),
    Quantity(TEACHER_FORCED, Component.DIT, _teacher_forced),
    Quantity(FREE_RUNNING, Component.DIT, _free_running),
    Quantity("decoder", Component.DECODER, _decoder),
    Quantity("encoder", Component.ENCODER, _encoder),
)


def component_of(distribution: str) -> Component:
    """Return the component that a distribution of this name is about."""
    return next(quantity.component for quantity in QUANTITIES if quantity.name == distribution)


def _valid(path: Trajectory) -> Region:
    return Region(axis=2, stop=path.valid)


def _observed(
    case: GenerationCase, region: Region, expected: NDArray[Any], actual: NDArray[Any], step: int | None = None
) -> Observation:
    what = case.name if step is None else f"{case.name} step={step}"
    return Observation(case.name, compare(region.of(expected), region.of(actual), what=f"output ({what})"), step)
