"""Seeded inputs with the statistics that each component meets in use, and which of them a verification runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import SLOT_INPUTS, SPECS, Component, contract, slots
from sa3_convert.runtime.autoencode import patched
from sa3_convert.runtime.sampling import sigmas

SAMPLER_STEPS = 8
"""Steps of the published default schedule, from which the DiT's `t` is taken."""

_SECONDS = (30.0, 0.0, 120.0, 5.0, 384.0, 47.5, 1.0, 190.0, 11.0, 500.0)
"""Durations that users ask for, both ends of the range, and one beyond it that the model clamps."""
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Region:
    """A part of an output, along one axis: the whole of it unless told otherwise."""

    label: str = ""
    axis: int = 0
    start: int = 0
    stop: int | None = None

    def of(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the region as a view."""
        return array[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


@dataclass(frozen=True, slots=True)
class Sample:
    """One set of inputs, and which parts of the output mean something."""

    name: str
    """Says how to make it again: seed, and T where there is one."""
    latents: int
    feeds: Mapping[str, NDArray[Any]] = field(repr=False)
    regions: tuple[Region, ...] = (Region(),)
    """Parts of the output that are judged each on its own."""


def sample_inputs(component: Component, layout: CheckpointLayout, *, seed: int, latents: int) -> Sample:
    """Return one sample of a component's inputs, as its contract names, types and shapes them.

    The seed, any integer of at least 0, also walks through prompt lengths, durations, noise levels and masks. T, the
    number of latents, is rounded up to an even one where the component needs that, ignored where it has no length.
    """
    ports = contract(component, layout)
    if SPECS[component].even_latents:
        latents += latents % 2
    length = latents if ports.is_dynamic else 0
    random = np.random.default_rng([seed, list(Component).index(component), length])
    feeds, regions = _MAKERS[component](random, layout, seed, latents)
    name = f"seed={seed}" + (f" T={latents}" if ports.is_dynamic else "")
    return Sample(name, latents, feeds, regions)


_Made = tuple[dict[str, NDArray[Any]], tuple[Region, ...]]
_WHOLE = (Region(),)


def _text_encoder(random: np.random.Generator, layout: CheckpointLayout, seed: int, latents: int) -> _Made:
    text = layout.text_encoder
    assert text is not None
    # Every fourth prompt fills the window; the others are log-uniform, short ones being the common ones.
    full = seed % 4 == 3
    count = text.max_length if full else int(text.max_length ** random.uniform(0.3, 0.95))
    ids = np.zeros((1, text.max_length), np.int32)
    # Log-uniform over the vocabulary: BPE ids are ordered by merge, so frequent pieces have small ones. 0 is padding.
    ids[0, :count] = np.exp(random.uniform(0, math.log(text.vocab_size - 1), count)).astype(np.int32)
    mask = _leading_ones(text.max_length, count, np.int32)
    return {"input_ids": ids, "attention_mask": mask}, text_regions(count, text.max_length)


def _number_conditioner(random: np.random.Generator, layout: CheckpointLayout, seed: int, latents: int) -> _Made:
    assert layout.number_conditioner is not None
    spread = seed * _GOLDEN_RATIO % 1 * layout.number_conditioner.max_value
    seconds = _SECONDS[seed] if seed < len(_SECONDS) else spread
    return {"seconds": np.array([seconds], np.float32)}, _WHOLE


def _dit(random: np.random.Generator, layout: CheckpointLayout, seed: int, latents: int) -> _Made:
    dit, text = layout.dit, layout.text_encoder
    assert dit is not None
    assert text is not None
    # One of the sampler's evaluations, in an order that starts spread out.
    t = float(sigmas(SAMPLER_STEPS)[seed * 3 % SAMPLER_STEPS])
    clean = _normal(random, 1, dit.io_channels, latents)
    noise = _normal(random, 1, dit.io_channels, latents)
    # The latent length is rounded up to a pair, so one or two positions at the end are padding; inputs shorter than
    # the window that a batch shares have more.
    padded = min(latents // 4, (0, 1, 2, latents // 4)[seed % 4])
    seconds = _normal(random, max(dit.cond_token_dim, dit.global_cond_dim)) * np.float32(0.6)
    local = np.zeros((1, dit.local_add_cond_dim, latents), np.float32)
    if seed % 3 == 2:  # inpainting: the first third is kept
        local[:, 0, : latents // 3] = 1
        kept = min(dit.io_channels, dit.local_add_cond_dim - 1)
        local[:, 1 : 1 + kept] = (clean * local[:, :1])[:, :kept]
    feeds = {
        "x": ((1 - t) * clean + t * noise).astype(np.float32),
        "t": np.array([t], np.float32),
        "cross_attn_cond": _text_encoding(random, text.max_length, seconds[: dit.cond_token_dim]),
        "global_embed": seconds[None, : dit.global_cond_dim],
        "local_add_cond": local,
        "padding_mask": _leading_ones(latents, latents - padded, np.float32),
    }
    return feeds, (Region(axis=2, stop=latents - padded),)


def _decoder(random: np.random.Generator, layout: CheckpointLayout, seed: int, latents: int) -> _Made:
    return {"latents": _normal(random, 1, layout.autoencoder.latent_dim, latents)}, _WHOLE


def _encoder(random: np.random.Generator, layout: CheckpointLayout, seed: int, latents: int) -> _Made:
    auto = layout.autoencoder
    audio = _audio(random, auto.audio_channels, latents * auto.downsampling_ratio, layout.sample_rate)
    return {"patched_audio": patched(audio[None], auto.patch_size)}, _WHOLE


_MAKERS = {
    Component.TEXT_ENCODER: _text_encoder,
    Component.NUMBER_CONDITIONER: _number_conditioner,
    Component.DIT: _dit,
    Component.DECODER: _decoder,
    Component.ENCODER: _encoder,
}


def text_regions(count: int, max_length: int) -> tuple[Region, ...]:
    """Return what is judged of a text encoding [1, max_length, width]: the prompt, and the learned padding behind it.

    Apart, because the padding is a constant that hardly any scheme touches: it would lift the figure of a short prompt.
    """
    prompt = Region(axis=1, stop=count)
    padding = Region("padding", axis=1, start=count)
    return tuple(part for part, size in ((prompt, count), (padding, max_length - count)) if size)


def _text_encoding(random: np.random.Generator, tokens: int, seconds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return [1, tokens + 1, width]: RMS-normalised rows, one learned row repeated as padding, the duration's row."""
    width = seconds.size
    count = int(tokens ** random.uniform(0.3, 0.95))
    rows = random.standard_normal((count, width))
    rows /= np.sqrt(np.mean(rows**2, axis=1, keepdims=True))
    padding = np.broadcast_to(0.1 * random.standard_normal(width), (tokens - count, width))
    return np.concatenate([rows, padding, seconds[None]], dtype=np.float32)[None]


def _audio(random: np.random.Generator, channels: int, samples: int, sample_rate: int) -> NDArray[np.float32]:
    """Return [channels, samples] like music: decaying harmonic tones over noise that falls by 6 dB an octave."""
    frequencies = np.fft.rfftfreq(samples, 1 / sample_rate)
    shape = np.where(frequencies < 16000, 1 / np.maximum(frequencies, 40.0), 0.0)
    spectrum = random.standard_normal((channels, shape.size)) + 1j * random.standard_normal((channels, shape.size))
    noise = np.fft.irfft(spectrum * shape, samples)
    audio: NDArray[np.float64] = 0.05 * noise / noise.std()
    seconds = np.arange(samples) / sample_rate
    for pitch in random.uniform(60, 1200, 4):
        pan = random.uniform(0.2, 1.0, (channels, 1))
        envelope = np.exp(-2 * (seconds % random.uniform(0.15, 0.6)) / 0.3)
        for harmonic in (1, 2, 3, 5):
            tone = np.sin(2 * math.pi * pitch * harmonic * seconds + random.uniform(0, 2 * math.pi))
            audio += 0.12 / harmonic * pan * envelope * tone
    return np.clip(audio, -1, 1).astype(np.float32)


def _normal(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return random.standard_normal(shape).astype(np.float32)


def _leading_ones(length: int, count: int, dtype: type[np.generic]) -> NDArray[Any]:
    mask = np.zeros((1, length), dtype)
    mask[:, :count] = 1
    return mask


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


def samples_for(
    component: Component, layout: CheckpointLayout, *, quick: bool, rank: int | None = None
) -> list[Sample]:
    """Return the samples of a component, for a model with slots of a rank if given; the full set contains the quick."""
    samples = [sample_inputs(component, layout, seed=s, latents=t) for s, t in _pairs(component, quick)]
    if rank is None:
        return samples
    adapters = {kind: _adapter(component, layout, rank, kind) for kind in _ADAPTERS}
    pairs = ((sample, _ADAPTERS[i % len(_ADAPTERS)]) for i, sample in enumerate(samples))
    return [
        replace(sample, name=f"{sample.name} adapter={kind}", feeds={**sample.feeds, **adapters[kind]})
        for sample, kind in pairs
    ]


_ADAPTERS = ("none", "lora", "bora")
"""With nothing in the slots, with a low-rank step, and with factors of rows and columns too."""


def _adapter(component: Component, layout: CheckpointLayout, rank: int, kind: str) -> dict[str, NDArray[np.float32]]:
    """Return what a model with slots takes: a step with a third of the weights' norm, factors from 0.8 to 1.2."""
    random = np.random.default_rng([rank, _ADAPTERS.index(kind)])
    ports = contract(component, layout, rank).inputs[-len(SLOT_INPUTS) :]
    feeds = {port.name: np.zeros(port.concrete(0), np.float32) for port in ports}
    inner, outer = feeds.values()
    for slot in slots(component, layout) if kind != "none" else ():
        for whole, start, size, spread in (
            (inner, slot.inner, slot.fan_in, slot.fan_in**-0.5),
            (outer, slot.outer, slot.fan_out, rank**-0.5 / 3),
        ):
            part = whole[start * (rank + 1) : (start + size) * (rank + 1)]
            part[size:] = random.standard_normal(size * rank) * spread
            part[:size] = random.uniform(-0.2, 0.2, size) * (kind == "bora")
    return feeds
