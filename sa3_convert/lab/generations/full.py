"""`verify --full`: everything that can be found out about a bundle, and how much work that is."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.bundle import verify_bundle
from sa3_convert.check.inputs import lengths_of, samples_for
from sa3_convert.check.progress import Report, reference_stage, sampled_stage
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.check.results import BundleFidelity, advice
from sa3_convert.components import Component
from sa3_convert.errors import VerificationError
from sa3_convert.lab.bisect.bisect import bisect_bundle
from sa3_convert.lab.bisect.result import BisectResult
from sa3_convert.lab.generations.cases import FULL_CASES, STEPS, GenerationCase, end_to_end_cases
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
from sa3_convert.lab.generations.trajectory import StagedPipeline, case_feeds
from sa3_convert.runtime.conditioning import lengths
from sa3_convert.runtime.engines import KINDS, EngineName


@dataclass(frozen=True, slots=True)
class Findings:
    """A verification's results; a part that was not asked for is None or empty."""

    bundle: BundleFidelity
    """Each model on sampled inputs, against its floor."""
    engine: EngineName = "mnn"
    """What the whole generations ran on: MNN, or ONNX Runtime with 8-bit integers."""
    generations: GenerationFidelity | None = None
    """Each component over whole generations, the DiT per step."""
    end_to_end: EndToEnd | None = None
    """From prompt to audio, beside the chaos floor."""
    bisections: Mapping[Component, BisectResult] = field(default_factory=dict)
    """Of components that fell short."""

    @property
    def short(self) -> Mapping[Component, Distribution]:
        """Components whose own error is below the floor in a generation, with the distribution that shows it.

        Free-running generations have no floor: errors of the whole chain feed on themselves there.
        """
        own = [] if self.generations is None else self.generations.distributions
        return {
            component_of(d.name): d
            for d in own
            if d.name != FREE_RUNNING and d.summary.worst < self._floors[component_of(d.name)]
        }

    @property
    def _floors(self) -> Mapping[Component, float]:
        return {v.fidelity.component: v.floor_db for v in self.bundle.verdicts if v.engine == self.engine}

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a sentence each."""
        sampled = [problem for verdict in self.bundle.verdicts for problem in verdict.problems]
        for component, distribution in self.short.items():
            found = distribution.summary
            step = "" if found.worst_step is None else f" step={found.worst_step}"
            floor = self._floors[component]
            sampled.append(
                f"{component.value}: generation {found.worst_case}{step} has {found.worst:.2f} dB, the floor is "
                f"{floor:g} dB.{advice(found.worst, floor)}"
            )
        return tuple(sampled)

    @property
    def passed(self) -> bool:
        """Whether every model reached its floor, on sampled inputs and in every generation."""
        return not self.problems

    def check(self) -> None:
        """Raise VerificationError naming every model that falls short."""
        if problems := self.problems:
            raise VerificationError("\n".join(problems))

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data: that of the bundle, and each further part under its own name."""
        parts: dict[str, Any] = {
            "engine": self.engine,
            "passed": self.passed,
            "problems": list(self.problems),
            "generations": None if self.generations is None else self.generations.to_data(),
            "end_to_end": None if self.end_to_end is None else self.end_to_end.to_data(),
            "bisections": {component.value: found.to_data() for component, found in self.bisections.items()},
        }
        return self.bundle.to_data() | parts


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
) -> dict[str, float]:
    """Return the cost of each stage that `verify_fully` reports, references included; kept ones cost nothing after all.

    Args:
        bundle: the bundle.
        cases: what is generated.
        steps: of the denoising loop.
        components: which models are looked at; empty is all.
        quick: fewer and shorter sampled inputs.

    """
    wanted = [c for c in bundle.components if not components or c in components]
    found: dict[str, float] = {}
    for component in wanted:
        sampled = sum(_cost(component, latents) for latents in lengths_of(component, quick=quick))
        kinds = {a.kind for a in bundle.manifest.artifacts if a.component is component}
        found |= {sampled_stage(component, engine): sampled for engine, kind in KINDS.items() if kind in kinds}

    def generated(component: Component, chosen: Sequence[GenerationCase]) -> float:
        runs = steps if component is Component.DIT else 1
        return sum(runs * _cost(component, lengths(bundle.layout, case.seconds).latents) for case in chosen)

    for stage in (stage for stage in QUANTITIES if stage.component in wanted):
        found[stage.name] = generated(stage.component, stage.distinct(cases))
        found[reference_stage(stage.component)] = found[stage.name]
    compared = end_to_end_cases(cases)
    found[CHAOS] = generated(Component.DIT, compared) + generated(Component.DECODER, compared)
    found[TARGET] = generated(Component.DIT, [case for case in compared if Component.DIT not in wanted])
    found[TARGET_AUDIO] = generated(Component.DECODER, compared)
    return found


def _cost(component: Component, latents: int) -> float:
    run, per_latent = _COSTS[component]
    return run + per_latent * latents


_AUDIBLE = {Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER, Component.DIT, Component.DECODER}


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
    report: Report = lambda what, done, total: None,
    heard: Heard = lambda case, side, audio: None,
) -> Findings:
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

    Raises:
        BundleError: a file is missing or is not what the manifest says, or the bundle cannot generate.
        VerificationError: manifest, recipe and file disagree, or an output cannot be compared. A model that falls short
            raises nothing: see `Findings.check`.
        ModelFileError: a file cannot be loaded or run.
        UsageError: a duration is beyond the model's limit.

    """
    wanted = tuple(c for c in bundle.components if not components or c in components)
    with staged_pipelines(bundle, engine=engine, store=store, steps=steps, threads=threads) as (references, target):
        fidelity = verify_bundle(bundle, components=wanted, quick=quick, threads=threads, store=store, progress=report)
        generations = measure_components(references, target, cases, report, components=wanted)
        findings = Findings(fidelity, engine=engine, generations=generations)
        if set(wanted) >= _AUDIBLE:
            heard_cases = end_to_end_cases(cases)
            findings = replace(findings, end_to_end=measure_end_to_end(references, target, heard_cases, report, heard))
        if bisecting:
            findings = with_bisections(bundle, findings, references, threads=threads, report=report)
    return findings


def with_bisections(
    bundle: Bundle,
    findings: Findings,
    references: StagedPipeline | None = None,
    *,
    threads: int | None = None,
    report: Report = lambda what, done, total: None,
) -> Findings:
    """Bisect every MNN model that fell short at its worst case, sampled or in a generation.

    Args:
        bundle: the bundle.
        findings: what was found in it.
        references: of the bundle, if there are generations among the findings.
        threads: of either engine; None leaves it to them.
        report: called as work goes on.

    Returns:
        The findings, with what was found.

    Raises:
        ModelFileError: a file cannot be run.
        VerificationError: reference and target have no tensor in common.

    """
    sampled = {v.fidelity.component: v for v in findings.bundle.verdicts if v.engine == "mnn" and not v.passed}
    generated = findings.short if findings.engine == "mnn" else {}
    failed = [component for component in bundle.components if component in {*sampled, *generated}]
    found: dict[Component, BisectResult] = {}
    for done, component in enumerate(failed):
        report(f"{component.value}, bisecting", done, len(failed))
        if component in sampled:
            samples = {s.name: s.feeds for s in samples_for(component, bundle.layout, quick=False)}
            feeds = samples[sampled[component].fidelity.worst_case.case]
        else:
            assert references is not None
            worst = generated[component].summary
            feeds = case_feeds(references, component, GenerationCase.parse(worst.worst_case), worst.worst_step)
        found[component] = bisect_bundle(bundle, component, feeds=feeds, threads=threads)
    return replace(findings, bisections=found)
