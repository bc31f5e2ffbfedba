"""What is generated to judge a bundle: prompts × seeds × durations, each case by its name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from sa3_convert.errors import UsageError
from sa3_convert.runtime.request import GenerateRequest

PROMPTS: tuple[str, ...] = (
    "warm analog synth pad",
    "Fast drum and bass with a rolling sub bass, chopped amen breaks and bright vocal stabs, 174 BPM",
    "A door creaks open in an empty stone hall, footsteps come closer, then silence",
    "dog bark",
    "",
    "Ruhige Klaviermelodie in Moll, leise Streicher, ein Sommerabend am See",
    "雨の夜、静かなジャズトリオ、ブラシのドラムとウッドベース",
    (
        "Epic orchestral film score in D minor: low strings begin alone with a slow ostinato, French horns enter with "
        "the main theme, the choir joins in the second half, timpani rolls build to a climax with full brass and "
        "cymbals, then a solo cello repeats the theme over a held chord while the hall's reverberation fades away; "
        "recorded in a large scoring stage, wide stereo image, natural dynamics, no percussion loop, 72 BPM"
    ),
)
_END_TO_END_PROMPTS = (0, 1, 2, 6)
"""A sound, a piece of music, an effect, and a prompt that is not English."""


@dataclass(frozen=True, slots=True)
class GenerationCase:
    """What is generated; its name says all of it."""

    prompt: int
    """Index into `PROMPTS`."""
    seed: int
    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.prompt < len(PROMPTS):
            raise UsageError(f"There is no prompt {self.prompt}; prompts are 0 to {len(PROMPTS) - 1}.")
        self.request(steps=1)

    @property
    def name(self) -> str:
        """A name that `parse` reads back."""
        seconds = np.format_float_positional(self.seconds, trim="-")
        return f"prompt={self.prompt} seed={self.seed} seconds={seconds}"

    @property
    def text(self) -> str:
        """The prompt itself."""
        return PROMPTS[self.prompt]

    def request(self, steps: int) -> GenerateRequest:
        """Return the request: as the model suits it, but without guidance, so that each step evaluates the DiT once."""
        return GenerateRequest(self.text, seconds=self.seconds, seed=self.seed, steps=steps, cfg_scale=1.0)

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the case of a name; raise UsageError if it is none."""
        found = re.fullmatch(r"prompt=(\d{1,3}) seed=(\d{1,20}) seconds=(\d{1,9}(?:\.\d+)?)", name.strip(), re.ASCII)
        if found is None or int(found[1]) >= len(PROMPTS):
            raise UsageError(
                f"{name!r} is no case. Write 'prompt=0 seed=1 seconds=5', with a prompt from 0 to {len(PROMPTS) - 1}."
            )
        return cls(int(found[1]), int(found[2]), float(found[3]))


def all_cases(prompts: Sequence[int], seeds: Sequence[int], seconds: Sequence[float]) -> tuple[GenerationCase, ...]:
    """Return every combination."""
    return tuple(GenerationCase(p, s, n) for n in seconds for p in prompts for s in seeds)


STEPS = 8
SEEDS = (0, 1)
DURATIONS = (2.0, 5.0, 10.0)
FULL_CASES: tuple[GenerationCase, ...] = all_cases(range(len(PROMPTS)), SEEDS, DURATIONS)
"""What a full verification generates."""


def end_to_end_cases(cases: Sequence[GenerationCase]) -> tuple[GenerationCase, ...]:
    """Return those of the cases that are decoded on both sides and beside the chaos floor.

    Of each of four prompts (of the first one, if there are other prompts only) the case of middle duration with the
    first seed.
    """
    prompts = [p for p in _END_TO_END_PROMPTS if any(case.prompt == p for case in cases)] or [cases[0].prompt]
    chosen = []
    for prompt in prompts:
        durations = sorted({case.seconds for case in cases if case.prompt == prompt})
        middle = durations[len(durations) // 2]
        chosen.append(next(case for case in cases if (case.prompt, case.seconds) == (prompt, middle)))
    return tuple(chosen)
