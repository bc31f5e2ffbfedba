"""Loops: how long one is, and how its end is made to lead into its beginning."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sa3_convert.arrays import Floats


@dataclass(frozen=True, slots=True)
class Loop:
    """Bars of music that are played over and over."""

    bpm: float
    bars: int
    beats_per_bar: int

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.bars * self.beats_per_bar * 60 / self.bpm

    @property
    def generated_seconds(self) -> float:
        """What the model is asked for: a bar more, because pieces fade or resolve where they end."""
        return (self.bars + 1) * self.beats_per_bar * 60 / self.bpm

    def samples(self, rate: int) -> int:
        """Return how many samples it has per channel."""
        return round(self.seconds * rate)

    def fade(self, rate: int) -> int:
        """Return how many samples of its continuation are faded into its beginning: a beat."""
        return min(round(60 / self.bpm * rate), int(self.generated_seconds * rate) - self.samples(rate))


def closed(chunks: Iterable[Floats], samples: int, fade: int) -> Iterator[Floats]:
    """Yield audio of `samples` whose last one leads into its first, of chunks [1, 2, n] that go on for `fade` more.

    Where nothing is to be faded the chunks are yielded as they come.
    """
    if not fade:
        yield from chunks
        return
    audio = np.concatenate(list(chunks), axis=2)
    audio[..., :fade] = crossfaded(audio[..., samples:], audio[..., :fade])
    yield audio[..., :samples]


def crossfaded(leaving: Floats, coming: Floats) -> Floats:
    """Return a crossfade of two equally long pieces that starts as the one and goes on as the other.

    Gains are straight lines, both divided by what keeps the power for the measured correlation ρ: √(a² + b² +
    2ρab). That is a linear crossfade for equal pieces and one of equal power for unrelated ones.
    """
    rise = np.arange(leaving.shape[-1]) / leaving.shape[-1]
    fall = 1 - rise
    power = np.sqrt(np.sum(np.square(leaving, dtype=np.float64)) * np.sum(np.square(coming, dtype=np.float64)))
    product = float(np.sum(np.multiply(leaving, coming, dtype=np.float64)))
    # Pieces against each other cancel whatever is done; making them louder for it would only be heard.
    correlation = max(product / float(power), 0.0) if power else 0.0
    level = np.sqrt(rise**2 + fall**2 + 2 * correlation * rise * fall)
    faded: Floats = (leaving * (fall / level) + coming * (rise / level)).astype(np.float32)
    return faded
