"""`drift`: a bundle's figures held to those that a kept baseline says are right."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Final

import numpy as np

from sa3_convert.arrays import Arrays, Session
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.bundle import bundle_recipe, verify_bundle
from sa3_convert.check.inputs import sample_inputs
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.check.results import BundleFidelity, Progress, Verdict
from sa3_convert.checkpoint.variants import size_of
from sa3_convert.components import Component
from sa3_convert.errors import InputError
from sa3_convert.lab.drift.baseline import (
    HOW_TO_START,
    Baseline,
    BundleBaseline,
    Figure,
    Kind,
    Origin,
    Update,
    now,
    read_baseline,
    write_baseline,
)
from sa3_convert.lab.drift.compare import (
    BY_ENGINE,
    Drift,
    Statistic,
    compare_figures,
    counted,
    may_fall_by,
    scatter,
    size_may_grow_by,
    speed_may_grow_by,
)
from sa3_convert.lab.generations.distribution import Distribution, GenerationFidelity, Observation, measure_components
from sa3_convert.lab.generations.end_to_end import staged_pipelines
from sa3_convert.lab.generations.full import Verification
from sa3_convert.lab.generations.trajectory import STEPS, GenerationCase, all_cases, possible_cases
from sa3_convert.mnn.file.audit import audit
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.recipe import ComponentRecipe, Recipe
from sa3_convert.runtime.engines import bundle_engine
from sa3_convert.runtime.models import Models
from sa3_convert.system.machine import machine, tool_versions
from sa3_convert.system.sealed import source_digest

_DIGITS = 4
_STATISTICS: Mapping[Statistic, Callable[[Sequence[float]], float]] = {
    "mean": fmean,
    "5 %": lambda ratios: float(np.percentile(ratios, 5)),
    "worst": min,
}


def storage_figures(bundle: Bundle, recipe: Recipe) -> Iterator[Figure]:
    """Yield size and storage of each `.mnn`."""
    for component in bundle.components:
        size = bundle.artifact(component).total_bytes
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
    name, case = f"{BY_ENGINE}{verdict.engine}", None
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


REPEATS: Final = 5
_LATENTS: Final[Mapping[Component, int]] = {Component.DIT: 108, Component.DECODER: 32, Component.ENCODER: 32}
_SHORTEST: Final = 0.05
"""Seconds of work between two looks at the clock, whose steps can be of milliseconds."""


def speed_figures(bundle: Bundle, report: Progress) -> Iterator[Figure]:
    """Yield one ratio per component; both of its models are in memory together."""
    engines = [bundle_engine(bundle, name, {"threads": 1}) for name in ("onnxruntime", "mnn")]
    for done, component in enumerate(bundle.components):
        report("speed", done, len(bundle.components))
        sample = sample_inputs(component, bundle.layout, seed=0, latents=_LATENTS.get(component, 1))
        reference, target = (Models(engine).use(component) for engine in engines)
        with reference as first, target as second:
            ratios = time_ratios(first, second, sample.feeds)
        ratio = statistics.median(ratios)
        yield Figure(
            component=component,
            kind="speed",
            name="time, MNN / ONNX Runtime",
            value=round(ratio, 4),
            rule="may not rise",
            tolerance=round(speed_may_grow_by(ratio, ratios), 4),
        )


def time_ratios(reference: Session, target: Session, feeds: Arrays, repeats: int = REPEATS) -> list[float]:
    """Return the target's time over the reference's, in pairs of which every other one starts with the target."""
    sessions = (reference, target)
    for session in sessions:
        session.run(feeds)
    runs = math.ceil(_SHORTEST / max(_seconds(reference, feeds, 1), 1e-6))
    ratios = []
    for turn in range(repeats):
        seconds = {}
        for index in (0, 1) if turn % 2 else (1, 0):
            seconds[index] = _seconds(sessions[index], feeds, runs)
        ratios.append(seconds[1] / seconds[0])
    return ratios


def _seconds(session: Session, feeds: Arrays, runs: int) -> float:
    start = time.process_time()
    for _ in range(runs):
        session.run(feeds)
    return time.process_time() - start


DEFAULT_CASES: tuple[GenerationCase, ...] = all_cases((0, 2, 4, 7), (0, 1), (2.0, 5.0))
"""What a new baseline measures unless told otherwise: two seeds of each prompt and duration, for the scatter."""
ROOMS = ("checkpoint", "networks", "export", "passes", "rounding", "mnn", "convert", "runtime", "check")
"""Folders of our code that figures depend on."""


def no_report(what: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    cases: tuple[GenerationCase, ...] = DEFAULT_CASES
    steps: int = STEPS
    speed: bool = True
    threads: int | None = None
    store: ReferenceStore | None = None
    """Where reference outputs are kept for the next time; None computes them anew."""


def measure_bundle(bundle: Bundle, plan: Plan, report: Progress = no_report) -> tuple[list[Figure], Verification]:
    """Verify a bundle and take its figures.

    Raises:
        BundleError: a file is missing or is not what the manifest says, or the bundle cannot generate.
        VerificationError: it does not hold what it says, or a model is below its floor: no figure of it means anything.

    """
    verified = verify_bundle(bundle, quick=True, threads=plan.threads, store=plan.store, progress=report)
    verified.check()
    figures = [*storage_figures(bundle, bundle_recipe(bundle)), *sampled_figures(verified)]
    with staged_pipelines(bundle, store=plan.store, steps=plan.steps, threads=plan.threads) as (references, target):
        generations = measure_components(references, target, plan.cases, report)
    figures += generation_figures(generations)
    if plan.speed:
        figures += speed_figures(bundle, report)
    return figures, Verification.of(verified, generations=generations)


def origin_of(bundle: Bundle) -> Origin:
    """Return what a bundle's figures depend on."""
    manifest = bundle.manifest
    return Origin(
        converted_with=manifest.tools,
        measured_with=tool_versions(),
        processor=machine()["processor"],
        recipe=bundle_recipe(bundle).model_dump(mode="json", by_alias=True),
        checkpoint={c.value: digest for c, digest in manifest.checkpoint.digests.items()},
        code={room: source_digest(room) for room in ROOMS},
        files={e.path: e.sha256 for a in manifest.artifacts if a.kind != "recipe" for e in a.files},
    )


def key_of(bundle: Bundle) -> tuple[str, str, str]:
    """Return what a bundle's part of a baseline is found by: variant with its LoRAs, recipe, size."""
    return bundle.manifest.label, bundle.manifest.recipe, size_of(bundle.layout)


def find_baseline(path: Path, bundle: Bundle) -> BundleBaseline:
    """Return what a baseline file holds a bundle to.

    Raises:
        InputError: there is no such file, it is damaged, or it knows no such bundle.

    """
    baseline = read_baseline(path)
    if baseline is None:
        raise InputError(f"There is no baseline {path}. {HOW_TO_START}")
    found = baseline.find(key_of(bundle))
    if found is None:
        known = "; ".join(" ".join(b.key) for b in baseline.bundles)
        raise InputError(
            f"Baseline {path} knows nothing of {' '.join(key_of(bundle))}; it holds {known}. Give the baseline of this "
            f"bundle, or add it: --update --reason 'why'."
        )
    return found


def plan_of(baseline: BundleBaseline, plan: Plan) -> Plan:
    """Return a plan with the cases and steps of a baseline, without speed if that has none."""
    has_speed = any(figure.kind == "speed" for figure in baseline.figures)
    cases = tuple(GenerationCase.parse(name) for name in baseline.cases)
    return replace(plan, cases=cases, steps=baseline.steps, speed=plan.speed and has_speed)


def check_drift(bundle: Bundle, baseline: BundleBaseline, plan: Plan, report: Progress = no_report) -> Drift:
    """Measure what a baseline measured, in the same cases and steps, and compare; raises as `measure_bundle`."""
    figures, _ = measure_bundle(bundle, plan_of(baseline, plan), report)
    return compare_figures(baseline, figures, origin_of(bundle))


def update_baseline(
    path: Path, bundle: Bundle, reason: str, plan: Plan, report: Progress = no_report
) -> tuple[BundleBaseline, Drift | None]:
    """Measure a bundle and make it the baseline, others in the same file untouched.

    Returns:
        The new baseline, and how it differs from the one before, if there was one of the same cases.

    Raises:
        InputError: the file is damaged; nothing is written over it.
        BundleError: as `measure_bundle`.
        VerificationError: as `measure_bundle`, or a generation is below a floor: what fails becomes no baseline.

    """
    known = read_baseline(path)
    before = known.find(key_of(bundle)) if known else None
    figures, found = measure_bundle(bundle, plan, report)
    found.check()
    variant, recipe, size = key_of(bundle)
    made = BundleBaseline(
        variant=variant,
        recipe=recipe,
        size=size,
        cases=tuple(case.name for case in plan.cases),
        steps=plan.steps,
        figures=tuple(figures),
        origin=origin_of(bundle),
        history=(*(before.history if before else ()), Update(date=now(), reason=reason, tools=tool_versions())),
    )
    write_baseline(path, known.replacing(made) if known else Baseline(schema_version=1, bundles=(made,)))
    comparable = before is not None and (before.cases, before.steps) == (made.cases, made.steps)
    return made, compare_figures(before, made.figures, made.origin) if before and comparable else None


def cases_of(path: Path, bundle: Bundle, named: Sequence[str]) -> tuple[GenerationCase, ...]:
    """Return the cases of a new baseline: those that are named, else those of the one that it replaces.

    Raises:
        InputError: the file is damaged.
        UsageError: a name is none of a case.

    """
    if named:
        return tuple(dict.fromkeys(GenerationCase.parse(name) for name in named))
    known = read_baseline(path)
    before = known.find(key_of(bundle)) if known else None
    if before:
        return tuple(GenerationCase.parse(name) for name in before.cases)
    return possible_cases(DEFAULT_CASES, bundle.layout)
