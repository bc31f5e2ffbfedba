"""A bundle's figures for drift: sizes, what is stored, ratios as distributions and per step."""

from collections.abc import Iterable, Iterator
from statistics import fmean

import numpy as np

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.results import BundleFidelity, ComponentFidelity
from sa3_convert.components import Component
from sa3_convert.lab.drift.baseline import Figure, Kind
from sa3_convert.lab.drift.compare import Statistic, counted, may_fall_by, scatter, size_may_grow_by
from sa3_convert.lab.generations.cases import GenerationCase
from sa3_convert.lab.generations.distribution import Distribution, GenerationFidelity, Observation
from sa3_convert.mnn.file.audit import audit
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.recipe import ComponentRecipe, Recipe
from sa3_convert.runtime.engines import EngineName

_DIGITS = 4


def storage_figures(bundle: Bundle, recipe: Recipe) -> Iterator[Figure]:
    """Yield size and storage of each `.mnn`."""
    for component in bundle.components:
        size = sum(entry.bytes for entry in bundle.artifact(component).files)
        yield Figure(
            component=component,
            kind="size",
            name="bytes",
            value=float(size),
            rule="may not rise",
            tolerance=round(size_may_grow_by(size)),
        )
        stored = _stored(bundle, component, recipe.for_component(component))
        yield Figure(component=component, kind="storage", name="storage", value=stored, rule="may not change")


def _stored(bundle: Bundle, component: Component, recipe: ComponentRecipe) -> str:
    """Return in words how a file stores its weights, token tables and other constants."""
    storage = read_storage(bundle.checked(component).path)
    parts = []
    for scheme in storage.summary()["weights"]:
        form = ""
        if scheme["scale_type"] is not None:
            block = f"blocks of {scheme['block_size']}" if scheme["block_size"] else "per channel"
            form = f" {'symmetric' if scheme['symmetric'] else 'asymmetric'}, {block}, {scheme['scale_type']} scales"
        parts.append(f"{scheme['layers']} × {scheme['type']}{form} ({scheme['elements']:,} weights)")
    parts += [f"embedding {t.type} {list(t.shape)}" for t in audit(storage, recipe).tables]
    if floats := sorted({constant.type for constant in storage.constants if constant.is_float}):
        parts.append(f"constants {' and '.join(floats)}")
    return "; ".join(parts)


def sampled_figures(result: BundleFidelity) -> Iterator[Figure]:
    """Yield mean and worst ratio of each model over the sampled inputs that every conversion runs."""
    for verdict in result.verdicts:
        yield from _sampled(verdict.fidelity, verdict.engine)


def _sampled(fidelity: ComponentFidelity, engine: EngineName) -> Iterator[Figure]:
    # Each case by its worst output, as a constant one would flatter it.
    by_case: dict[str, list[float]] = {}
    for measurement in fidelity.measurements:
        by_case.setdefault(measurement.case, []).append(measurement.fidelity.signal_to_noise_db)
    ratios = counted(min(group) for group in by_case.values())
    # Only MNN's models can be bisected.
    name, case = f"sampled inputs, {engine}", None
    if engine == "mnn":
        name, case = "sampled inputs", list(by_case)[ratios.index(min(ratios))]
    deviation = scatter([ratios])
    values: tuple[tuple[Statistic, float], ...] = (("mean", fmean(ratios)), ("worst", min(ratios)))
    for statistic, value in values:
        figure = _ratio(fidelity.component, "fidelity", name, statistic, value, len(ratios), deviation)
        yield figure.model_copy(update={"case": case})


def generation_figures(result: GenerationFidelity) -> Iterator[Figure]:
    """Yield mean, 5 % and worst of each distribution, and the DiT's means per step."""
    for distribution in result.distributions:
        yield from _distribution(distribution)
        for step in distribution.by_step():
            yield _step(distribution, step)


def _distribution(distribution: Distribution) -> Iterator[Figure]:
    ratios = counted(o.fidelity.signal_to_noise_db for o in distribution.observations)
    deviation = _deviation(distribution.observations)
    worst = distribution.observations[ratios.index(min(ratios))]
    values: tuple[tuple[Statistic, float], ...] = (
        ("mean", fmean(ratios)),
        ("5 %", float(np.percentile(ratios, 5))),
        ("worst", min(ratios)),
    )
    component, name = _of(distribution)
    for statistic, value in values:
        figure = _ratio(component, "fidelity", name, statistic, value, len(ratios), deviation)
        yield figure.model_copy(update={"case": worst.case, "step": worst.step})


def _step(distribution: Distribution, step: int) -> Figure:
    observations = [o for o in distribution.observations if o.step == step]
    ratios = counted(o.fidelity.signal_to_noise_db for o in observations)
    deviation = _deviation(observations)
    component, name = _of(distribution)
    figure = _ratio(component, "step", f"{name}, step {step}", "mean", fmean(ratios), len(ratios), deviation)
    return figure.model_copy(update={"case": observations[ratios.index(min(ratios))].case, "step": step})


def _ratio(
    component: Component, kind: Kind, name: str, statistic: Statistic, value: float, count: int, deviation: float
) -> Figure:
    return Figure(
        component=component,
        kind=kind,
        name=f"{name}: {statistic}",
        value=round(value, _DIGITS),
        rule="may not fall",
        tolerance=round(may_fall_by(statistic, value, count, deviation), _DIGITS),
    )


def _of(distribution: Distribution) -> tuple[Component, str]:
    """Return a distribution's component, and what it is called beside it."""
    component, _, how = distribution.name.partition(", ")
    return Component(component), how or "generations"


def _deviation(observations: Iterable[Observation]) -> float:
    """Return the standard deviation of ratios that differ in their seed alone, or of all where nothing else does."""
    groups: dict[tuple[object, ...], list[float]] = {}
    for observation in observations:
        case = GenerationCase.parse(observation.case)
        groups.setdefault((case.prompt, case.seconds, observation.step), []).append(
            observation.fidelity.signal_to_noise_db
        )
    by_seed = [counted(group) for group in groups.values()]
    if all(len(group) == 1 for group in by_seed):
        by_seed = [[ratio for group in by_seed for ratio in group]]
    return scatter(by_seed)
