"""Audio that stands in the page itself: lossless, so that what is heard is the models' own difference."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import soundfile
from numpy.typing import NDArray

from sa3_convert.runtime.audio import Quantiser

Floats = NDArray[np.float32]

_BITS = 16


@dataclass(frozen=True, slots=True)
class Clip:
    """A piece of audio as a `data:` URI."""

    uri: str
    bytes: int
    """Of the encoded audio; in the page it takes a third more."""


def clip(audio: Floats, sample_rate: int) -> Clip:
    """Return 16-bit FLAC; what lies beyond ±1 is clipped, as `run` does.

    Args:
        audio: [channels, samples].
        sample_rate: in Hz.

    """
    buffer = io.BytesIO()
    samples = Quantiser(_BITS, dither=False)(audio).astype(np.int16).T
    soundfile.write(buffer, samples, sample_rate, format="FLAC", subtype="PCM_16")
    data = buffer.getvalue()
    return Clip("data:audio/flac;base64," + base64.b64encode(data).decode("ascii"), len(data))
