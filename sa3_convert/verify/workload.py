"""How much work a full verification is, stage by stage, so that the time left can be told."""

from collections.abc import Collection, Mapping, Sequence

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.components import Component
from sa3_convert.runtime.lengths import lengths
from sa3_convert.runtime.opening import KINDS
from sa3_convert.verify.cases import lengths_of
from sa3_convert.verify.distribution import STAGES
from sa3_convert.verify.end_to_end import CHAOS, TARGET, TARGET_AUDIO
from sa3_convert.verify.generation import GenerationCase
from sa3_convert.verify.generations import end_to_end_cases
from sa3_convert.verify.progress import reference_stage, sampled_stage

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

    for stage in (stage for stage in STAGES if stage.component in wanted):
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
