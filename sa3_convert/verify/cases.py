"""Which cases a verification runs: a quick set that every conversion pays for, and the full one."""

from collections.abc import Mapping

from sa3_convert.checkpoint.layout import CheckpointLayout
from sa3_convert.components import Component
from sa3_convert.verify.inputs import Sample, sample_inputs

Cases = tuple[tuple[int, int], ...]
"""Pairs of (seed, latents)."""

# A DiT evaluation at T = 324 takes 2.5 s on two cores, a decode of 256 latents 3.5 s, in either engine.
_QUICK: Mapping[Component, Cases] = {
    Component.TEXT_ENCODER: tuple((seed, 1) for seed in range(4)),
    Component.NUMBER_CONDITIONER: tuple((seed, 1) for seed in range(16)),
    Component.DIT: ((0, 108), (1, 8), (2, 33), (3, 8), (5, 108), (7, 8)),
    Component.DECODER: ((0, 8), (1, 64)),
    Component.ENCODER: ((0, 8), (1, 64)),
}
_FULL: Mapping[Component, Cases] = {
    Component.TEXT_ENCODER: tuple((seed, 1) for seed in range(16)),
    Component.NUMBER_CONDITIONER: tuple((seed, 1) for seed in range(64)),
    # Each noise level of the sampler, at lengths from a second to half a minute, odd ones among them.
    Component.DIT: ((8, 324), (9, 108), (10, 324), (11, 7), (12, 216), (13, 33), (14, 108), (15, 324)),
    Component.DECODER: ((2, 2), (3, 4), (4, 32), (5, 108), (6, 256)),
    Component.ENCODER: ((2, 2), (3, 4), (4, 32), (5, 108), (6, 256)),
}


def _pairs(component: Component, quick: bool) -> Cases:
    """Return the cases of a component; the full set contains the quick one."""
    return tuple(dict.fromkeys(_QUICK[component] if quick else _QUICK[component] + _FULL[component]))


def lengths_of(component: Component, *, quick: bool) -> tuple[int, ...]:
    """Return T of each sample of a component."""
    return tuple(latents for _, latents in _pairs(component, quick))


def samples_for(component: Component, layout: CheckpointLayout, *, quick: bool) -> list[Sample]:
    """Return the samples of a component; the full set contains the quick one."""
    pairs = _pairs(component, quick)
    return [sample_inputs(component, layout, seed=seed, latents=latents) for seed, latents in pairs]
