"""How alike two pieces of audio sound: spectra, envelopes, loudness (ITU-R BS.1770-4), width."""

from collections.abc import Iterator

import numpy as np
import pyloudnorm
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from sa3_convert.arrays import Floats
from sa3_convert.check.results import FINITE, derived
from sa3_convert.errors import VerificationError

SILENCE_LUFS = -70.0
"""The standard's absolute gate: nothing quieter counts as sound, so this stands for all of it, silence included."""
_BLOCK_SECONDS = 0.4
# Of the filters that the library has, the one with the standard's own coefficients: a full-scale sine of 997 Hz in one
# channel gives -3.01 LUFS, where the library's default gives -3.05.
_FILTER = "DeMan"


def loudness(audio: NDArray[np.float64], sample_rate: int) -> float:
    """Return the integrated loudness in LUFS, finite and at least `SILENCE_LUFS`.

    The audio is [channels, samples], of one or two channels, finite; what is shorter than the standard's block of
    400 ms is taken to end in silence.
    """
    meter = pyloudnorm.Meter(sample_rate, filter_class=_FILTER, block_size=_BLOCK_SECONDS)
    missing = int(np.ceil(_BLOCK_SECONDS * sample_rate)) - audio.shape[1]
    whole = np.pad(audio, ((0, 0), (0, max(0, missing))))
    # Two filters in turn, in place: the meter works on a copy of its own.
    return max(SILENCE_LUFS, float(meter.integrated_loudness(np.ascontiguousarray(whole.T))))


WINDOWS = (512, 2048, 8192)
"""Samples per frame: from transients to tones."""
_FLOOR_DB = 80.0
"""How far below a piece's loudest bin quieter ones still count."""
_SILENCE = 1e-20
_ENVELOPE = 2048
_FRAMES_AT_ONCE = 256


@dataclass(frozen=True, config=FINITE)
class AudioFidelity:
    """Figures of a target's audio against the reference's."""

    spectral_distance_db: tuple[float, ...]
    """One per entry of `WINDOWS`: root mean square difference of log magnitudes in a frame, mean over frames and
    channels. 0 for the same audio."""
    envelope_correlation: float
    """Pearson's, of the level in frames of 2048 samples; 1 for the same audio."""
    loudness_db: float
    """Integrated loudness of the target less that of the reference, in LU; see `loudness` for silence."""
    width: float
    """Share of the side signal in the energy, target less reference; between -1 and 1."""

    @derived
    def mean_spectral_distance_db(self) -> float:
        """Mean over the window sizes."""
        return sum(self.spectral_distance_db) / len(self.spectral_distance_db)


def compare_audio(reference: Floats, target: Floats, sample_rate: int) -> AudioFidelity:
    """Compare two pieces, each [channels, samples] float32, of one or two channels and at least one sample."""
    if reference.shape != target.shape or reference.ndim != 2 or reference.size == 0:
        raise VerificationError(f"Audio of shape {list(target.shape)} is compared with {list(reference.shape)}.")
    if not (np.isfinite(reference).all() and np.isfinite(target).all()):
        raise VerificationError("Audio that is compared holds NaN or infinity.")
    first, second = reference.astype(np.float64), target.astype(np.float64)
    return AudioFidelity(
        spectral_distance_db=tuple(spectral_distance(first, second, window) for window in WINDOWS),
        envelope_correlation=_correlation(_envelope(first), _envelope(second)),
        loudness_db=loudness(second, sample_rate) - loudness(first, sample_rate),
        width=_side_share(second) - _side_share(first),
    )


def spectral_distance(reference: NDArray[np.float64], target: NDArray[np.float64], window: int) -> float:
    """Return the log-spectral distance in dB; [channels, samples] each, padded with silence to whole frames.

    Bins more than 80 dB below the reference's loudest count as just that quiet.
    """
    peak = max((frames.max(initial=0.0) for frames in _power(reference, window)), default=0.0)
    floor = max(peak * 10 ** (-_FLOOR_DB / 10), _SILENCE)
    total = count = 0.0
    for first, second in zip(_power(reference, window), _power(target, window), strict=True):
        difference = 10 * np.log10(np.maximum(second, floor) / np.maximum(first, floor))
        distances = np.sqrt(np.mean(difference**2, axis=-1))
        total += float(distances.sum())
        count += distances.size
    return total / count


def _power(audio: NDArray[np.float64], window: int) -> Iterator[NDArray[np.float64]]:
    """Yield power spectra [frames, bins] of Hann windows that overlap by three quarters, some frames at a time."""
    hop = window // 4
    for channel in audio:
        missing = max(window - channel.size, -(channel.size - window) % hop)
        frames = np.lib.stride_tricks.sliding_window_view(np.pad(channel, (0, missing)), window)[::hop]
        for start in range(0, len(frames), _FRAMES_AT_ONCE):
            yield np.abs(np.fft.rfft(frames[start : start + _FRAMES_AT_ONCE] * np.hanning(window), axis=-1)) ** 2


def _envelope(audio: NDArray[np.float64]) -> NDArray[np.float64]:
    energy = (audio**2).mean(axis=0)
    padded = np.pad(energy, (0, -energy.size % _ENVELOPE))
    root: NDArray[np.float64] = np.sqrt(padded.reshape(-1, _ENVELOPE).mean(axis=1))
    return root


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    first, second = first - first.mean(), second - second.mean()
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    # What does not vary correlates with nothing but itself.
    if scale < _SILENCE:
        return 1.0 if np.array_equal(first, second) else 0.0
    return float(np.clip((first * second).sum() / scale, -1, 1))


def _side_share(audio: NDArray[np.float64]) -> float:
    if audio.shape[0] != 2:
        return 0.0
    middle, side = audio[0] + audio[1], audio[0] - audio[1]
    energy = float((middle**2).sum() + (side**2).sum())
    return float((side**2).sum()) / energy if energy > 0 else 0.0
