"""What the DiT is told about the wanted sound: prompt tokens, duration, masks, and what is kept of given audio."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Floats
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.errors import AudioError, SettingError
from sa3_convert.runtime.audio import audio_length, read_audio
from sa3_convert.runtime.loop import Loop
from sa3_convert.runtime.prompts import Tokens

AudioSource = Path | Floats
"""A file, or stereo samples [2, N] at the model's rate."""
Region = tuple[float, float]
"""Start and end in seconds."""

DEFAULT_SECONDS = 10.0
PADDING_SECONDS = 6.0
"""What is generated beyond the wanted duration, as in training."""
_KEPT_ENCODINGS = 32
# The reference aligns to this many samples of the autoencoder's front even where it works with sliding windows.
_DEFAULT_CHUNK = 32


@dataclass(frozen=True, slots=True)
class Lengths:
    """All lengths of one generation."""

    samples: int
    """Samples per channel of the output."""
    latents: int
    """T of the denoising loop."""
    valid: int
    """Latents that attention sees, from the start; the rest is padding."""
    wanted: int
    """Latents of what the model is asked for, which the schedule may go by."""
    surplus: int = 0
    """Samples of a loop beyond the output that are asked for; what is given goes round there."""
    fade: int = 0
    """Of these, how many are decoded and faded into the beginning."""

    def padding_mask(self) -> Floats:
        """Return [1, T] float32, 1 = valid."""
        return (np.arange(self.latents) < self.valid).astype(np.float32)[np.newaxis]


def max_seconds(layout: CheckpointLayout) -> float:
    """Return the longest duration that the model can generate."""
    return layout.sample_size / layout.sample_rate


def check_duration(seconds: float) -> None:
    """Refuse what is no duration for any model."""
    if not math.isfinite(seconds) or seconds <= 0:
        raise SettingError("{seconds} is {0}; give a positive number.", seconds)


def duration_of(layout: CheckpointLayout, audio: Iterable[AudioSource | None], regions: Sequence[Region]) -> float:
    """Return how long a generation is where nobody says it: as the given audio and regions, within the model's limit.

    Raises AudioError if audio cannot be read, or does not say how long it is.
    """
    rate = layout.sample_rate
    samples = [_length(one, rate) for one in audio if one is not None]
    if not samples:
        return min(DEFAULT_SECONDS, max_seconds(layout))
    seconds = max(samples) / rate
    if int(seconds * rate) < max(samples):
        seconds = math.nextafter(seconds, math.inf)
    return min(max(seconds, *(end for _, end in regions)) if regions else seconds, max_seconds(layout))


def _length(audio: AudioSource, rate: int) -> int:
    if isinstance(audio, Path):
        return audio_length(audio, rate)
    _check_samples(audio)
    return int(audio.shape[1])


def alignment(layout: CheckpointLayout) -> int:
    """Return of what number of latents a generation is a multiple."""
    encoder = layout.autoencoder.encoder
    return max(1, (encoder.chunk_size or _DEFAULT_CHUNK) // encoder.stride)


def lengths(layout: CheckpointLayout, seconds: float, padding: float = PADDING_SECONDS) -> Lengths:
    """Return the lengths of a generation, of which `padding` seconds lie beyond what is wanted.

    Raises UsageError for a duration that the model cannot generate.
    """
    limit = max_seconds(layout)
    check_duration(seconds)
    rate, ratio = layout.sample_rate, layout.autoencoder.downsampling_ratio
    if seconds * rate >= layout.sample_size + 1:
        raise SettingError("{seconds} is {0:g}, beyond this model's limit of {1:.1f} seconds.", seconds, limit)
    samples = int(seconds * rate)
    if samples == 0:
        raise SettingError("{seconds} is {0:g}, shorter than one sample at {1} Hz.", seconds, rate)
    align = alignment(layout)
    latents = math.ceil(math.ceil(int((seconds + padding) * rate) / ratio) / align) * align
    latents = min(latents, layout.sample_size // ratio)
    wanted = math.ceil(samples / ratio)
    valid = min(wanted + int(padding * rate / ratio), latents)
    return Lengths(samples=samples, latents=latents, valid=valid, wanted=wanted)


def looped(sizes: Lengths, loop: Loop, rate: int) -> Lengths:
    """Return the lengths of a loop, from those of what is generated for it."""
    samples = loop.samples(rate)
    return replace(sizes, samples=samples, surplus=sizes.samples - samples, fade=loop.fade(rate))


def inpaint_mask(layout: CheckpointLayout, sizes: Lengths, regions: Sequence[Region]) -> Floats:
    """Return [1, 1, T] float32: 1 keeps, 0 generates anew. What lies beyond the duration is generated too.

    A latent counts by its first sample, so regions (checked by `check_regions`) move by less than one latent (93 ms).
    """
    first_sample = np.arange(sizes.latents) * layout.autoencoder.downsampling_ratio
    keep = first_sample < sizes.samples + sizes.surplus
    # What lies beyond a loop's end is its beginning.
    first_sample = np.where(keep & (first_sample >= sizes.samples), first_sample - sizes.samples, first_sample)
    for start, end in regions:
        inside = (first_sample >= int(start * layout.sample_rate)) & (first_sample < int(end * layout.sample_rate))
        if not inside.any():
            grid = layout.autoencoder.downsampling_ratio / layout.sample_rate
            why = f"is too short to change anything: the model works in steps of {grid:.3f} seconds. Widen it."
            raise _refused((start, end), why)
        keep &= ~inside
    return keep.astype(np.float32)[np.newaxis, np.newaxis]


def _refused(region: Region, why: str) -> SettingError:
    return SettingError("{inpaint} {0:g}:{1:g} {2}", *region, why)


def check_regions(regions: Sequence[Region], seconds: float) -> None:
    """Check that inpaint regions lie within the duration, in order, without overlap."""
    previous: Region | None = None
    for region in sorted(regions):
        start, end = region
        if not (math.isfinite(start) and math.isfinite(end)):
            raise _refused(region, "is not finite.")
        if start >= end:
            raise _refused(region, "ends before it starts.")
        if start < 0 or end > seconds:
            raise _refused(region, f"lies outside of the {seconds:g} seconds to be generated.")
        if previous is not None and start < previous[1]:
            raise _refused(region, f"overlaps {previous[0]:g}:{previous[1]:g}. Join them.")
        previous = region


def given_audio(
    layout: CheckpointLayout, source: AudioSource | None, sizes: Lengths, warnings: list[str]
) -> Floats | None:
    """Return given audio as [1, 2, T · ratio] float32: cut, or padded with silence, to what the model works on."""
    if source is None:
        return None
    rate = layout.sample_rate
    if isinstance(source, Path):
        samples = read_audio(source, rate, max_seconds=max_seconds(layout))
    else:
        samples = source
        _check_samples(samples)
    if samples.shape[1] > sizes.samples:
        warnings.append(
            f"The given audio lasts {samples.shape[1] / rate:.2f} seconds; what lies beyond the "
            f"{sizes.samples / rate:.2f} seconds to be generated has no part in the output."
        )
    if sizes.surplus:
        samples = samples[:, : sizes.samples]
        whole = np.pad(samples, ((0, 0), (0, sizes.samples - samples.shape[1])))
        samples = np.concatenate((whole, whole[:, : sizes.surplus]), axis=1)
    audio = np.zeros((1, 2, sizes.latents * layout.autoencoder.downsampling_ratio), np.float32)
    length = min(samples.shape[1], audio.shape[2])
    audio[0, :, :length] = samples[:, :length]
    return audio


def _check_samples(samples: Floats) -> None:
    if samples.ndim != 2 or samples.shape[0] != 2 or samples.shape[1] == 0 or samples.dtype != np.float32:
        raise AudioError(
            f"Given samples are {samples.dtype} of shape {list(samples.shape)}; expected float32 [2, N] at the "
            "model's rate."
        )
    if not np.isfinite(samples).all():
        raise AudioError("Given samples hold NaN or infinities.")


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Inputs of the DiT that stay the same in all steps, under one prompt."""

    cross_attn_cond: Floats
    """[1, tokens + 1, D]: the prompt's tokens, then the duration's."""
    global_embed: Floats
    """[1, D], of the duration."""

    def without_prompt(self) -> "Conditioning":
        """Return what guidance compares with when there is no negative prompt: zeros for every token."""
        return Conditioning(np.zeros_like(self.cross_attn_cond), self.global_embed)


class Encodings:
    """What was encoded lately, by its content: variations, guidance and batches encode the same prompts and audio."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, Floats] = OrderedDict()

    def of(
        self, inputs: Sequence[Sequence[NDArray[Any]]], encode: Callable[[list[int]], Iterable[Floats]]
    ) -> list[Floats]:
        """Return the encoding of each input, which is some arrays; `encode` gets the numbers of those not known yet."""
        keys = [self._key(arrays) for arrays in inputs]
        missing = {key: number for number, key in enumerate(keys) if key not in self._kept}
        if missing:
            self._kept.update(zip(missing, encode([*missing.values()]), strict=True))
        found = [self._kept[key] for key in keys]
        for key in keys:
            self._kept.move_to_end(key)
        while len(self._kept) > _KEPT_ENCODINGS:
            self._kept.popitem(last=False)
        return found

    @staticmethod
    def _key(arrays: Sequence[NDArray[Any]]) -> bytes:
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape} ".encode())
            digest.update(array.tobytes())
        return digest.digest()


def conditioning(prompt: Floats, seconds: Floats) -> Conditioning:
    """Join the embeddings of prompt and duration."""
    return Conditioning(np.concatenate((prompt, seconds), axis=1), seconds[:, 0])


def negative_conditioning(prompt: Floats, tokens: Tokens, seconds: Floats) -> Conditioning:
    """Join the embeddings of a negative prompt and the duration; padded positions are zero, not the learned padding."""
    return conditioning(prompt * tokens.mask[:, :, np.newaxis].astype(np.float32), seconds)


def local_conditioning(channels: int, length: int, mask: Floats | None = None, latents: Floats | None = None) -> Floats:
    """Return the DiT's `local_add_cond`, [1, channels + 1, T] float32: inpainting mask and what it keeps.

    The mask is [1, 1, T], 1 = keep; the latents are [1, C, T]. Without inpainting everything is zero.
    """
    if mask is None or latents is None:
        return np.zeros((1, channels + 1, length), np.float32)
    return np.concatenate((mask, latents * mask), axis=1)
