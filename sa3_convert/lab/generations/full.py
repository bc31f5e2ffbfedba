"""`verify --full`: everything that can be found out about a bundle, and how much work that is."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property, partial
from typing import Annotated, Any, Self

from pydantic import PlainSerializer, SkipValidation, TypeAdapter
from pydantic.dataclasses import dataclass

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.bundle import verify_bundle
from sa3_convert.check.inputs import lengths_of, samples_for
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.check.results import FINITE, BundleFidelity, Progress, advice, derived, reference_stage, sampled_stage
from sa3_convert.checkpoint.variants import is_miniature
from sa3_convert.components import Component
from sa3_convert.lab.bisect.bisect import bisect_bundle
from sa3_convert.lab.bisect.walk import BisectResult
from sa3_convert.lab.generations.distribution import (
    FREE_RUNNING,
    QUANTITIES,
    Distribution,
    GenerationFidelity,
    component_of,
    measure_components,
)
from sa3_convert.lab.generations.end_to_end import (
    CHAOS,
    TARGET,
    TARGET_AUDIO,
    EndToEnd,
    Heard,
    measure_end_to_end,
    staged_pipelines,
)
from sa3_convert.lab.generations.shared import AUDIBLE, Measured, on_workers
from sa3_convert.lab.generations.trajectory import (
    FULL_CASES,
    STEPS,
    GenerationCase,
    StagedPipeline,
    case_feeds,
    end_to_end_cases,
)
from sa3_convert.lab.miniature.judge import MODES, Mode, Recognition, judged
from sa3_convert.runtime.conditioning import lengths
from sa3_convert.runtime.engines import KINDS, EngineName
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.scheduling import Runner


def _bisections(found: Mapping[Component, BisectResult]) -> dict[str, dict[str, Any]]:
    return {component.value: result.to_data() for component, result in found.items()}


@dataclass(frozen=True, config=FINITE)
class Verification(BundleFidelity):
    """All that a verification found, and what `verify --json` writes; what was not asked for is None or empty."""

    engine: EngineName = "mnn"
    """What the whole generations ran on: MNN, or a form for ONNX Runtime."""
    generations: GenerationFidelity | None = None
    """Each component over whole generations, the DiT per step."""
    end_to_end: EndToEnd | None = None
    """From prompt to audio, beside the chaos floor."""
    recognitions: tuple[Recognition, ...] = ()
    """Of the miniature: how many of its prompts are recognised in what the reference and the target make of them."""
    bisections: Annotated[Mapping[Component, SkipValidation[BisectResult]], PlainSerializer(_bisections)] = field(
        default_factory=dict
    )
    """Of components that fell short, each as `bisect --json` writes it."""

    @classmethod
    def of(cls, found: BundleFidelity, **parts: Any) -> Self:
        """Return the verdicts on a bundle's models with further parts."""
        return cls(found.bundle, found.recipe, found.verdicts, found.contradictions, adapted=found.adapted, **parts)

    @cached_property
    def short(self) -> Mapping[Component, Distribution]:
        """Components whose own error is below the floor in a generation, with the distribution that shows it.

        Free-running generations have no floor: errors of the whole chain feed on themselves there.
        """
        own = [] if self.generations is None else self.generations.distributions
        return {
            component_of(d.name): d
            for d in own
            if d.name != FREE_RUNNING and d.worst < self.floors[component_of(d.name)]
        }

    @cached_property
    def floors(self) -> Mapping[Component, float]:
        """Of the models that the generations ran on."""
        return {v.component: v.floor_db for v in self.verdicts if v.engine == self.engine}

    @derived
    def problems(self) -> tuple[str, ...]:
        """What is wrong on sampled inputs and in generations, a sentence each."""
        found = list(super().problems)
        for component, distribution in self.short.items():
            floor, ratio = self.floors[component], distribution.worst
            found.append(
                f"{component.value}: generation {distribution.place} has {ratio:z.2f} dB, the floor is {floor:g} dB."
                f"{advice(ratio, floor)}"
            )
        return tuple(found)

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        data: dict[str, Any] = TypeAdapter(Verification).dump_python(self, mode="json", by_alias=True)
        return data


_COSTS: Mapping[Component, tuple[float, float]] = {
    Component.TEXT_ENCODER: (0.5, 0),
    Component.NUMBER_CONDITIONER: (0.002, 0),
    Component.DIT: (0.1, 0.0105),
    Component.DECODER: (0, 0.014),
    Component.ENCODER: (0, 0.022),
}
"""Seconds of one run, and more of them per latent: small-music on two cores. Only their ratios matter."""


def workload(
    bundle: Bundle,
    cases: Sequence[GenerationCase],
    *,
    steps: int,
    components: Collection[Component] = (),
    quick: bool = False,
    on_workers: bool = False,
) -> dict[str, float]:
    """Return the cost of each stage of `verify_fully`, references included; kept ones cost nothing after all.

    A worker does at once what are several stages in one process: all models of a component on sampled inputs, and all
    of a case end to end.
    """
    wanted = [c for c in bundle.components if not components or c in components]
    found: dict[str, float] = {}
    for component in wanted:
        sampled = sum(_cost(component, latents) for latents in lengths_of(component, quick=quick))
        kinds = {a.kind for a in bundle.manifest.artifacts if a.component is component}
        for engine in (engine for engine, kind in KINDS.items() if kind in kinds):
            name = sampled_stage(component, "mnn" if on_workers else engine)
            found[name] = found.get(name, 0) + sampled

    def generated(component: Component, chosen: Sequence[GenerationCase]) -> float:
        runs = steps if component is Component.DIT else 1
        return sum(runs * _cost(component, lengths(bundle.layout, case.seconds).latents) for case in chosen)

    for stage in (stage for stage in QUANTITIES if stage.component in wanted):
        found[stage.name] = generated(stage.component, stage.distinct(cases))
        found[reference_stage(stage.component)] = found[stage.name]
    if set(wanted) >= AUDIBLE:
        compared = end_to_end_cases(cases)
        # What the target goes on from was computed for the distributions.
        ends = {TARGET: 0.0, TARGET_AUDIO: generated(Component.DECODER, compared)}
        ends[CHAOS] = generated(Component.DIT, compared) + ends[TARGET_AUDIO]
        found |= {TARGET: sum(ends.values())} if on_workers else ends
    return found


def _cost(component: Component, latents: int) -> float:
    run, per_latent = _COSTS[component]
    return run + per_latent * latents


def verify_fully(
    bundle: Bundle,
    *,
    cases: Sequence[GenerationCase] = FULL_CASES,
    steps: int = STEPS,
    components: Collection[Component] = (),
    engine: EngineName = "mnn",
    quick: bool = False,
    store: ReferenceStore | None = None,
    threads: int | None = None,
    bisecting: bool = True,
    report: Progress = lambda what, done, total: None,
    heard: Heard = lambda case, side, audio: None,
    runner: Runner | None = None,
) -> Verification:
    """Compare each model with its reference on sampled inputs and over whole generations, and generations end to end.

    Models that fall short are bisected at their worst case. One model is in memory at a time.

    Args:
        bundle: the bundle; it can generate.
        cases: what to generate.
        steps: of the denoising loop.
        components: which models to look at; empty is all. End to end is left out unless all are looked at.
        engine: what runs the generations; each model is compared on sampled inputs whichever it is for.
        quick: fewer and shorter sampled inputs.
        store: where reference outputs are kept for the next time; None computes them anew.
        threads: of either engine; None leaves it to them.
        bisecting: whether to bisect models that fall short.
        report: called as work goes on.
        heard: called with the audio that was generated end to end.
        runner: of workers that measure in place of this process; they see the bundle, and the store, which must be.

    Raises:
        BundleError: a file is missing or is not what the manifest says, or the bundle cannot generate.
        VerificationError: manifest, recipe and file disagree, or an output cannot be compared. A model that falls short
            raises nothing: see `Verification.check`.
        ModelFileError: a file cannot be loaded or run.
        UsageError: a duration is beyond the model's limit.

    """
    wanted = tuple(c for c in bundle.components if not components or c in components)
    with staged_pipelines(bundle, engine=engine, store=store, steps=steps, threads=threads) as (references, target):
        how: dict[str, Any] = {"quick": quick, "threads": threads, "report": report, "heard": heard}
        if runner is None:
            measured = _measured_here(references, target, wanted, cases, store=store, **how)
        else:
            assert store is not None, "workers share references by a store"
            measured = on_workers(runner, bundle, wanted, cases, store=store, engine=engine, steps=steps, **how)
        fidelity, generations, end_to_end = measured
        findings = Verification.of(fidelity, engine=engine, generations=generations, end_to_end=end_to_end)
        if bisecting:
            findings = with_bisections(bundle, findings, references, threads=threads, report=report)
    return findings


def _measured_here(
    references: StagedPipeline,
    target: StagedPipeline,
    wanted: tuple[Component, ...],
    cases: Sequence[GenerationCase],
    *,
    quick: bool,
    threads: int | None,
    store: ReferenceStore | None,
    report: Progress,
    heard: Heard,
) -> Measured:
    how: dict[str, Any] = {"quick": quick, "threads": threads, "store": store, "progress": report}
    fidelity = verify_bundle(target.bundle, components=wanted, **how)
    generations = measure_components(references, target, cases, report, components=wanted)
    if not set(wanted) >= AUDIBLE:
        return fidelity, generations, None
    return fidelity, generations, measure_end_to_end(references, target, end_to_end_cases(cases), report, heard)


def recognised(
    bundle: Bundle,
    engines: Sequence[EngineName],
    modes: Sequence[Mode] = MODES,
    *,
    steps: int = STEPS,
    report: Progress = lambda what, done, total: None,
) -> tuple[Recognition, ...]:
    """Return what is recognised in what engines make of the miniature's bundle; of another model's nothing can be."""
    found = []
    for engine in engines if is_miniature(bundle.layout) else ():
        with Pipeline.from_bundle(bundle.path, engine, check=False, keep_loaded=True) as pipeline:
            for mode in modes:
                told = partial(report, f"recognised: {mode} on {engine}")
                found.append(judged(pipeline, engine, mode=mode, steps=steps, report=told))
    return tuple(found)


def with_bisections(
    bundle: Bundle,
    findings: Verification,
    references: StagedPipeline | None = None,
    *,
    threads: int | None = None,
    report: Progress = lambda what, done, total: None,
) -> Verification:
    """Return the verification with a bisection of every MNN model that fell short, sampled or in a generation.

    Each is bisected at its worst case; for one in a generation the bundle's references are needed.
    """
    sampled = {v.component: v for v in findings.verdicts if v.engine == "mnn" and not v.passed}
    generated = findings.short if findings.engine == "mnn" else {}
    failed = [component for component in bundle.components if component in {*sampled, *generated}]
    found: dict[Component, BisectResult] = {}
    for done, component in enumerate(failed):
        report(f"{component.value}, bisecting", done, len(failed))
        if component in sampled:
            samples = {s.name: s.feeds for s in samples_for(component, bundle.layout, quick=False)}
            feeds = samples[sampled[component].worst_case.case]
        else:
            assert references is not None
            worst = generated[component]
            feeds = case_feeds(references, component, GenerationCase.parse(worst.worst_case), worst.worst_step)
        found[component] = bisect_bundle(bundle, component, feeds=feeds, threads=threads)
    return replace(findings, bisections=found)
