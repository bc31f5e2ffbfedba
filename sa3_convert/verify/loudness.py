"""Integrated loudness as broadcasters measure it (ITU-R BS.1770-4)."""

import numpy as np
import pyloudnorm
from numpy.typing import NDArray

SILENCE_LUFS = -70.0
"""The standard's absolute gate: nothing quieter counts as sound, so this stands for all of it, silence included."""
_BLOCK_SECONDS = 0.4
# Of the filters that the library has, the one with the standard's own coefficients: a full-scale sine of 997 Hz in one
# channel gives -3.01 LUFS, where the library's default gives -3.05.
_FILTER = "DeMan"


def loudness(audio: NDArray[np.float64], sample_rate: int) -> float:
    """Return the integrated loudness in LUFS, finite and at least `SILENCE_LUFS`.

    Args:
        audio: [channels, samples], one or two channels, finite; what is shorter than the standard's block of 400 ms is
            taken to end in silence.
        sample_rate: in Hz.

    """
    meter = pyloudnorm.Meter(sample_rate, filter_class=_FILTER, block_size=_BLOCK_SECONDS)
    missing = int(np.ceil(_BLOCK_SECONDS * sample_rate)) - audio.shape[1]
    whole = np.pad(audio, ((0, 0), (0, max(0, missing))))
    # Two filters in turn, in place: the meter works on a copy of its own.
    return max(SILENCE_LUFS, float(meter.integrated_loudness(np.ascontiguousarray(whole.T))))
