"""What a generation tells on its way: stages, steps, audio, and a report of it all."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sa3_convert.arrays import Floats
from sa3_convert.runtime.conditioning import Lengths
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.sampling import Step

StageName = Literal["text", "encode", "denoise", "decode"]


@dataclass(frozen=True, slots=True)
class Started:
    """A stage begins."""

    stage: StageName


@dataclass(frozen=True, slots=True)
class Stepped:
    """One denoising step is done."""

    step: Step
    steps: int


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """The next samples, in order and without overlap."""

    start: int
    """Samples before these."""
    samples: Floats
    """[2, n] float32 within ±1."""


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """What was done; the last event of a generation."""

    request: GenerateRequest
    """With every default filled in."""
    lengths: Lengths
    latents: Floats
    """[1, C, T] float32, what the denoising loop gave; undefined beyond `lengths.valid`."""
    seconds: Mapping[StageName, float]
    """Wall-clock seconds per stage, loading included, the consumer's own time excluded."""
    engine: Mapping[str, Any]
    """What ran the models."""
    warnings: tuple[str, ...]


Event = Started | Stepped | AudioChunk | Report


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """A whole generation."""

    audio: Floats
    """[2, N] float32 within ±1."""
    sample_rate: int
    report: Report


@dataclass(slots=True)
class Notes:
    """Warnings and times of a generation under way."""

    warnings: list[str] = field(default_factory=list)
    seconds: dict[StageName, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, stage: StageName) -> Iterator[None]:
        """Count the time of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def timed_next(self, iterator: Iterator[Any], stage: StageName) -> Any:
        """Return an iterator's next value, or None at its end, its time counted to a stage."""
        with self.timed(stage):
            return next(iterator, None)
