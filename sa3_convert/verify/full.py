"""Everything that can be found out about a bundle, in one call."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.components import Component
from sa3_convert.runtime.engines import EngineName
from sa3_convert.verify.bisect_bundle import bisect_bundle
from sa3_convert.verify.bisect_result import BisectResult
from sa3_convert.verify.bundle import verify_bundle
from sa3_convert.verify.case_feeds import case_feeds
from sa3_convert.verify.cases import samples_for
from sa3_convert.verify.distribution import measure
from sa3_convert.verify.end_to_end import Heard, generate_both
from sa3_convert.verify.findings import Findings
from sa3_convert.verify.generation import GenerationCase
from sa3_convert.verify.generations import FULL_CASES, STEPS, both_sides, end_to_end_cases
from sa3_convert.verify.progress import Report
from sa3_convert.verify.reference_store import ReferenceStore
from sa3_convert.verify.sides import References

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
    with both_sides(bundle, engine=engine, store=store, steps=steps, threads=threads) as (references, target):
        fidelity = verify_bundle(bundle, components=wanted, quick=quick, threads=threads, store=store, progress=report)
        findings = Findings(
            fidelity, engine=engine, generations=measure(references, target, cases, report, components=wanted)
        )
        if set(wanted) >= _AUDIBLE:
            heard_cases = end_to_end_cases(cases)
            findings = replace(findings, end_to_end=generate_both(references, target, heard_cases, report, heard))
        if bisecting:
            findings = with_bisections(bundle, findings, references, threads=threads, report=report)
    return findings


def with_bisections(
    bundle: Bundle,
    findings: Findings,
    references: References | None = None,
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
