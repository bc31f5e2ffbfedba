"""A bundle's figures for drift: sizes, what is stored, ratios as distributions and per step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean

import numpy as np

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.results import BundleFidelity, Verdict
from sa3_convert.components import Component
from sa3_convert.lab.drift.baseline import Figure, Kind
from sa3_convert.lab.drift.compare import Statistic, counted, may_fall_by, scatter, size_may_grow_by
from sa3_convert.lab.generations.cases import GenerationCase
from sa3_convert.lab.generations.distribution import Distribution, GenerationFidelity, Observation
from sa3_convert.mnn.file.audit import audit
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.recipe import ComponentRecipe, Recipe

_DIGITS = 4
_STATISTICS: Mapping[Statistic, Callable[[Sequence[float]], float]] = {
    "mean": fmean,
    "5 %": lambda ratios: float(np.percentile(ratios, 5)),
    "worst": min,
}


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
        yield from _sampled(verdict)


def _sampled(verdict: Verdict) -> Iterator[Figure]:
    by_case = {case: figures.signal_to_noise_db for case, figures in verdict.by_case.items()}
    ratios = counted(by_case.values())
    # Only MNN's models can be bisected.
    name, case = f"sampled inputs, {verdict.engine}", None
    if verdict.engine == "mnn":
        name, case = "sampled inputs", list(by_case)[ratios.index(min(ratios))]
    statistics: tuple[Statistic, ...] = ("mean", "worst")
    for statistic in statistics:
        yield _ratio(verdict.component, "fidelity", name, statistic, ratios, scatter([ratios]), case)


def generation_figures(result: GenerationFidelity) -> Iterator[Figure]:
    """Yield mean, 5 % and worst of each distribution, and the DiT's means per step."""
    for distribution in result.distributions:
        component, name = _of(distribution)
        observations = distribution.observations
        yield from _observed(component, "fidelity", name, _STATISTICS, observations)
        for step in distribution.by_step:
            at_step = [o for o in observations if o.step == step]
            yield from _observed(component, "step", f"{name}, step {step}", ("mean",), at_step)


def _observed(
    component: Component, kind: Kind, name: str, statistics: Iterable[Statistic], observations: Sequence[Observation]
) -> Iterator[Figure]:
    ratios = counted(o.signal_to_noise_db for o in observations)
    worst, deviation = observations[ratios.index(min(ratios))], _deviation(observations)
    for statistic in statistics:
        yield _ratio(component, kind, name, statistic, ratios, deviation, worst.case, worst.step)


def _ratio(
    component: Component,
    kind: Kind,
    name: str,
    statistic: Statistic,
    ratios: Sequence[float],
    deviation: float,
    case: str | None,
    step: int | None = None,
) -> Figure:
    value = _STATISTICS[statistic](ratios)
    return Figure(
        component=component,
        kind=kind,
        name=f"{name}: {statistic}",
        value=round(value, _DIGITS),
        rule="may not fall",
        tolerance=round(may_fall_by(statistic, value, len(ratios), deviation), _DIGITS),
        case=case,
        step=step,
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
        groups.setdefault((case.prompt, case.seconds, observation.step), []).append(observation.signal_to_noise_db)
    by_seed = [counted(group) for group in groups.values()]
    if all(len(group) == 1 for group in by_seed):
        by_seed = [[ratio for group in by_seed for ratio in group]]
    return scatter(by_seed)
