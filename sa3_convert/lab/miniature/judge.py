"""How many prompts of a fixed set, worded as no training has seen them, are recognised in what a model makes."""

from collections.abc import Callable, Iterator
from dataclasses import field
from typing import Final

import numpy as np
from pydantic.dataclasses import dataclass

from sa3_convert.check.metrics import wilson
from sa3_convert.check.results import FINITE, derived
from sa3_convert.lab.miniature.captions import caption
from sa3_convert.lab.miniature.recognise import unlike
from sa3_convert.lab.miniature.sounds import Floats, Piece, sampled
from sa3_convert.runtime.output_checks import CHECKS
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest

PROMPTS: Final = 150
_SEED: Final = 2026

Heard = Callable[[str, Floats, list[str]], None]
"""Called with a prompt, what was made of it, and what does not fit in that."""


@dataclass(frozen=True, config=FINITE)
class Recognition:
    """How many pieces are recognised."""

    engine: str
    recognised: int
    of: int
    missed: tuple[tuple[str, str], ...] = field(default=())
    """Prompts that are not, and what does not fit."""

    @derived
    def interval(self) -> tuple[float, float]:
        """Share that is recognised, at least and at most: Wilson's interval of 95 %."""
        return wilson(self.recognised, self.of)

    @property
    def judgement(self) -> str:
        """All of it in a sentence."""
        low, high = self.interval
        return f"On {self.engine} {self.recognised} of {self.of} sounds are recognised ({low:.0%} to {high:.0%})."


def prompts(count: int = PROMPTS) -> Iterator[tuple[Piece, str]]:
    """Yield pieces and their wordings, always the same ones."""
    random = np.random.default_rng(_SEED)
    for _ in range(count):
        piece = sampled(random)
        yield piece, caption(piece, random, kept=True)


def judged(
    pipeline: Pipeline,
    engine: str,
    *,
    count: int = PROMPTS,
    steps: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    heard: Heard = lambda prompt, audio, wrong: None,
) -> Recognition:
    """Generate every prompt, the n-th from seed n, and count what is recognised."""
    missed = []
    for index, (piece, prompt) in enumerate(prompts(count)):
        report(index, count)
        request = GenerateRequest(prompt, seconds=piece.seconds, seed=index, steps=steps)
        audio = pipeline.generate(request, allow=CHECKS).audio
        if wrong := unlike(piece, audio):
            missed.append((prompt, "; ".join(wrong)))
        heard(prompt, audio, wrong)
    return Recognition(engine, count - len(missed), count, tuple(missed))
