"""How many prompts of a fixed set, worded as no training has seen them, are recognised in what a model makes."""

from collections.abc import Callable, Iterator
from dataclasses import field, replace
from typing import Final, Literal, get_args

import numpy as np
from pydantic.dataclasses import dataclass

from sa3_convert.check.metrics import wilson
from sa3_convert.check.results import FINITE, derived
from sa3_convert.lab.miniature.captions import caption
from sa3_convert.lab.miniature.recognise import unlike
from sa3_convert.lab.miniature.sounds import Floats, Piece, render, sampled
from sa3_convert.runtime.output_checks import CHECKS
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest

PROMPTS: Final = 150
_SEED: Final = 2026

Mode = Literal["text to audio", "audio to audio", "inpainting"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)
"""From the prompt alone, from the sound of the prompt before, from the first half of the sound itself."""

Heard = Callable[[str, Floats, list[str]], None]
"""Called with a prompt, what was made of it, and what does not fit in that."""


@dataclass(frozen=True, config=FINITE)
class Recognition:
    """How many pieces are recognised."""

    engine: str
    recognised: int
    of: int
    mode: Mode = MODES[0]
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
        of = f"{self.recognised} of {self.of} sounds are recognised ({low:.0%} to {high:.0%})"
        return f"{self.mode.capitalize()} on {self.engine}: {of}."


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
    mode: Mode = MODES[0],
    count: int = PROMPTS,
    steps: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    heard: Heard = lambda prompt, audio, wrong: None,
) -> Recognition:
    """Generate every prompt, the n-th from seed n, and count what is recognised."""
    missed = []
    known = list(prompts(count))
    for index, (piece, prompt) in enumerate(known):
        report(index, count)
        request = GenerateRequest(prompt, seconds=piece.seconds, seed=index, steps=steps)
        match mode:
            case "audio to audio":
                request = replace(request, init_audio=render(known[index - 1][0]))
            case "inpainting":
                generated = (piece.seconds / 2, piece.seconds)
                request = replace(request, inpaint_audio=render(piece), inpaint=(generated,))
        audio = pipeline.generate(request, allow=CHECKS).audio
        if wrong := unlike(piece, audio):
            missed.append((prompt, "; ".join(wrong)))
        heard(prompt, audio, wrong)
    return Recognition(engine, count - len(missed), count, mode, tuple(missed))
