"""Levels of decoded audio: what becomes of peaks beyond full scale, and its loudness."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import soxr

from sa3_convert.arrays import Floats

PeakName = Literal["limit", "attenuate", "clip"]

CEILING = 0.977
"""What the limiter of the reference's releases for devices leaves, of full scale."""
_BLOCK = 64
"""Samples that have one gain."""
_REACH = 4
"""Blocks to each side over which a gain is held, and then smoothed."""
_CONTEXT = _BLOCK * (2 * _REACH + 1)
"""Samples to each side that a limited sample depends on, and some."""
_OVERSAMPLING = 4
SILENCE_LUFS = -70.0
"""The standard's absolute gate: nothing quieter counts as sound, so this stands for all of it, silence included."""
_FILTER, _BLOCK_SECONDS = "DeMan", 0.4
# Of the filters that the library has, the one with the standard's own coefficients: a full-scale sine of 997 Hz in one
# channel gives -3.01 LUFS, where the library's default gives -3.05.


class Level(Protocol):
    """Brings chunks [2, n] to their level as they come; what it keeps back comes with the last."""

    def add(self, audio: Floats) -> Floats:
        """Take in the next chunk, and return what is ready."""
        ...

    def finish(self) -> Floats:
        """Return the rest."""
        ...


def level(
    peak: PeakName, loudness_lufs: float | None, rate: int, note: Callable[[str], None], *, loop: bool = False
) -> Level:
    """Return what brings audio to its level; `note` is told what came out of a wanted loudness.

    `clip` and `limit` hand on as they go (`limit` 13 ms later); `attenuate`, loudness and loops need the whole first.
    Raises ImportError if what measures loudness is not installed.
    """
    lowered = partial(limited, loop=True) if loop and peak == "limit" else _PEAKS[peak]
    if loudness_lufs is not None:
        import pyloudnorm  # noqa: F401 -- missed before anything is generated

        return _Whole(lambda audio: _at_loudness(audio, loudness_lufs, lowered, rate, note))
    if peak == "attenuate" or loop:
        return _Whole(lowered)
    return _Limiter() if peak == "limit" else _Clip()


def limited(audio: Floats, *, loop: bool = False) -> Floats:
    """Return [2, n] with no sample beyond `CEILING`; where none was within 6 ms, nothing changes. A loop goes round.

    As the reference's: the gain that each block of 64 samples needs, in either channel, the least of nine blocks,
    smoothed by a Hann window over nine, and drawn as a line from the middle of a block to the next.
    """
    samples = audio.shape[1]
    if not samples:
        return audio
    peaks = np.pad(np.abs(audio).max(axis=0), (0, -samples % _BLOCK), mode="edge").reshape(-1, _BLOCK).max(axis=1)
    reduction = 1 - np.minimum(CEILING / np.maximum(peaks.astype(np.float64), 1e-12), 1)
    windows = np.lib.stride_tricks.sliding_window_view
    width = 2 * _REACH + 1
    held = windows(np.pad(reduction, _REACH, mode="wrap" if loop else "constant"), width).max(axis=1)
    hann = np.hanning(width)
    smooth = windows(np.pad(held, _REACH, mode="wrap" if loop else "edge"), width) @ (hann / hann.sum())
    middles = (np.arange(len(smooth)) + 0.5) * _BLOCK - 0.5
    gain = 1 - np.interp(np.arange(samples), middles, smooth, period=samples if loop else None)
    return np.asarray(audio * gain, np.float32)


def _attenuated(audio: Floats) -> Floats:
    return np.asarray(audio / np.float32(max(np.abs(audio).max(initial=0), 1)), np.float32)


def _clipped(audio: Floats) -> Floats:
    return np.asarray(np.clip(audio, -1, 1), np.float32)


_PEAKS: Mapping[PeakName, Callable[[Floats], Floats]] = {"limit": limited, "attenuate": _attenuated, "clip": _clipped}


class _Clip:
    def add(self, audio: Floats) -> Floats:
        return _clipped(audio)

    def finish(self) -> Floats:
        return np.zeros((2, 0), np.float32)


class _Limiter:
    """`limited`, in parts: what a sample depends on is kept until it is there."""

    def __init__(self) -> None:
        self._kept = np.zeros((2, 0), np.float32)
        self._done = 0
        """Samples of `_kept` that were handed on; a multiple of a block."""

    def add(self, audio: Floats) -> Floats:
        self._kept = np.concatenate((self._kept, audio), axis=1)
        ready = self._kept.shape[1] // _BLOCK * _BLOCK - _CONTEXT
        return self._until(max(ready, self._done))

    def finish(self) -> Floats:
        return self._until(self._kept.shape[1])

    def _until(self, end: int) -> Floats:
        made = limited(self._kept)[:, self._done : end]
        dropped = max(end - _CONTEXT, 0)
        self._kept, self._done = self._kept[:, dropped:], end - dropped
        return made


class _Whole:
    def __init__(self, change: Callable[[Floats], Floats]) -> None:
        self._change = change
        self._chunks: list[Floats] = []

    def add(self, audio: Floats) -> Floats:
        self._chunks.append(audio)
        return np.zeros((2, 0), np.float32)

    def finish(self) -> Floats:
        return self._change(np.concatenate(self._chunks, axis=1))


def _at_loudness(
    audio: Floats, wanted: float, lowered: Callable[[Floats], Floats], rate: int, note: Callable[[str], None]
) -> Floats:
    """Return audio brought to a loudness, and then its peaks to where they may be."""
    found = loudness(audio.astype(np.float64), rate)
    gain = 10 ** ((wanted - found) / 20) if found > SILENCE_LUFS else 1.0
    made = lowered(np.asarray(audio * gain, np.float32))
    reached, top = loudness(made.astype(np.float64), rate), true_peak_db(made, rate)
    why = f"; for {wanted:g} its peaks would lie beyond full scale" if reached < wanted - 0.1 else ""
    over = ", which a lossy file or a converter may clip" if top > 0 else ""
    note(f"{reached:.1f} LUFS{why}; true peak {top:+.1f} dBTP{over}.")
    return made


def loudness(audio: Any, sample_rate: int) -> float:
    """Return the integrated loudness in LUFS, finite and at least `SILENCE_LUFS`.

    The audio is [channels, samples], of one or two channels, finite; what is shorter than the standard's block of
    400 ms is taken to end in silence.
    """
    import pyloudnorm

    meter = pyloudnorm.Meter(sample_rate, filter_class=_FILTER, block_size=_BLOCK_SECONDS)
    missing = int(np.ceil(_BLOCK_SECONDS * sample_rate)) - audio.shape[1]
    whole = np.pad(audio, ((0, 0), (0, max(0, missing))))
    # Two filters in turn, in place: the meter works on a copy of its own.
    return max(SILENCE_LUFS, float(meter.integrated_loudness(np.ascontiguousarray(whole.T))))


def true_peak_db(audio: Floats, rate: int) -> float:
    """Return the peak between the samples, as a converter makes it, in dB of full scale."""
    between = soxr.resample(np.ascontiguousarray(audio.T), rate, _OVERSAMPLING * rate, quality="VHQ")
    return float(20 * np.log10(max(np.abs(between).max(initial=0), np.abs(audio).max(initial=0), 1e-10)))
