"""Each component over real generations: prompts × seeds × durations, and each step of the denoising loop.

The DiT is measured twice. Teacher-forced: every step starts from the reference's latents and conditioning, so the
figure is the model's own error at that step. Free-running: the target goes its own way from the same noise, so errors
feed on themselves; what is compared is where it stands after each step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.components import Component
from sa3_convert.errors import VerificationError
from sa3_convert.runtime.conditioning import conditioning
from sa3_convert.session import Arrays
from sa3_convert.verify.distribution_result import Distribution, Observation
from sa3_convert.verify.generation import GenerationCase, Trajectory, dit_constants, velocity_of
from sa3_convert.verify.inputs import Region, text_regions
from sa3_convert.verify.metrics import compare
from sa3_convert.verify.sides import References, Side

Report = Callable[[str, int, int], None]
"""(what is being measured, cases done, cases in all)"""

TEACHER_FORCED = "dit, teacher-forced"
FREE_RUNNING = "dit, free-running"


@dataclass(frozen=True, slots=True)
class GenerationFidelity:
    """The distributions of all components."""

    steps: int
    distributions: tuple[Distribution, ...]

    def of(self, name: str) -> Distribution:
        """Return a distribution by name."""
        return next(d for d in self.distributions if d.name == name)

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"steps": self.steps, "distributions": [d.to_data() for d in self.distributions]}


def measure(
    references: References,
    target: Side,
    cases: Sequence[GenerationCase],
    report: Report = lambda what, done, total: None,
) -> GenerationFidelity:
    """Measure every component that the target has.

    The references of a stage are computed, or fetched, before the target's first model is loaded; one model of either
    side is in memory at a time.

    Args:
        references: of the same bundle.
        target: runs the `.mnn` models.
        cases: what to generate.
        report: called as work goes on.

    Raises:
        VerificationError: there are no cases, or an output cannot be compared.
        UsageError: a duration is beyond the model's limit.

    """
    if not cases:
        raise VerificationError("There are no cases to generate.")
    _prepare(references, target, cases, report)
    stages: list[tuple[str, Component, Callable[[References, Side, GenerationCase], Iterator[Observation]]]] = [
        ("text_encoder", Component.TEXT_ENCODER, _text_encoder),
        ("number_conditioner", Component.NUMBER_CONDITIONER, _number_conditioner),
        (TEACHER_FORCED, Component.DIT, _teacher_forced),
        ("decoder", Component.DECODER, _decoder),
        ("encoder", Component.ENCODER, _encoder),
    ]
    found = []
    for name, component, observe in stages:
        if component not in target.bundle.components:
            continue
        observations: dict[tuple[str, int | None], Observation] = {}
        for done, case in enumerate(cases):
            report(name, done, len(cases))
            observations |= {(o.case, o.step): o for o in observe(references, target, case)}
        found.append(Distribution(name, tuple(observations.values())))
    found.insert(3, _free_running(references, target, cases, report))
    target.close()
    return GenerationFidelity(references.steps, tuple(found))


def _prepare(references: References, target: Side, cases: Sequence[GenerationCase], report: Report) -> None:
    """Have every reference computed, model by model."""
    stages: list[tuple[Component, Callable[[GenerationCase], object]]] = [
        (Component.TEXT_ENCODER, references.prompt_embedding),
        (Component.NUMBER_CONDITIONER, references.seconds_embedding),
        (Component.DIT, references.trajectory),
        (Component.DECODER, references.audio),
        (Component.ENCODER, references.encoded),
    ]
    for component, compute in stages:
        if component in target.bundle.components:
            for done, case in enumerate(cases):
                report(f"reference {component.value}", done, len(cases))
                compute(case)
    references.side.close()


def _text_encoder(references: References, target: Side, case: GenerationCase) -> Iterator[Observation]:
    expected, actual = references.prompt_embedding(case), target.prompt_embedding(case)
    count = int(target.tokens(case).mask.sum())
    # The prompt alone; an empty one has nothing but padding.
    region = text_regions(count, expected.shape[1])[0]
    yield _observed(f"prompt={case.prompt}", region, expected, actual)


def _number_conditioner(references: References, target: Side, case: GenerationCase) -> Iterator[Observation]:
    expected, actual = references.seconds_embedding(case), target.seconds_embedding(case)
    yield _observed(f"seconds={case.seconds:g}", Region(), expected, actual)


def _teacher_forced(references: References, target: Side, case: GenerationCase) -> Iterator[Observation]:
    path = references.trajectory(case)
    velocity = velocity_of(target.model(Component.DIT), target.layout, case, references.conditioning(case))
    for step, (x, t, expected) in enumerate(zip(path.inputs, path.times, path.velocities, strict=True)):
        yield _observed(case.name, _valid(path), expected, velocity(x, t), step)


def _free_running(
    references: References, target: Side, cases: Sequence[GenerationCase], report: Report
) -> Distribution:
    # All conditionings first: text encoder and DiT are not in memory together.
    prompts = {case.text: target.prompt_embedding(case) for case in cases}
    seconds = {case.seconds: target.seconds_embedding(case) for case in cases}
    observations = []
    for done, case in enumerate(cases):
        report(FREE_RUNNING, done, len(cases))
        path = references.trajectory(case)
        own = target.trajectory(case, conditioning(prompts[case.text], seconds[case.seconds]), steps=references.steps)
        for step, (expected, actual) in enumerate(zip(path.latents, own.latents, strict=True)):
            observations.append(_observed(case.name, _valid(path), expected, actual, step))
    return Distribution(FREE_RUNNING, tuple(observations))


def _decoder(references: References, target: Side, case: GenerationCase) -> Iterator[Observation]:
    actual = target.audio(case, references.trajectory(case).result)
    yield _observed(case.name, Region(), references.audio(case), actual)


def _encoder(references: References, target: Side, case: GenerationCase) -> Iterator[Observation]:
    actual = target.encoded(references.audio(case))
    yield _observed(case.name, Region(), references.encoded(case), actual)


def _valid(path: Trajectory) -> Region:
    return Region(axis=2, stop=path.valid)


def _observed(
    case: str, region: Region, expected: NDArray[Any], actual: NDArray[Any], step: int | None = None
) -> Observation:
    what = case if step is None else f"{case} step={step}"
    return Observation(case, compare(region.of(expected), region.of(actual), what=f"output ({what})"), step)


def dit_feeds(references: References, case: GenerationCase, step: int) -> Arrays:
    """Return the DiT's inputs at one step of the reference's way: what a bisection of the worst case needs.

    Raises:
        VerificationError: there is no such step.

    """
    path = references.trajectory(case)
    if not 0 <= step < len(path.times):
        raise VerificationError(f"There is no step {step}; steps are 0 to {len(path.times) - 1}.")
    x, t = path.inputs[step], path.times[step]
    constants = dit_constants(references.side.layout, case, references.conditioning(case))
    return {"x": x, "t": np.array([t], np.float32), **constants}
