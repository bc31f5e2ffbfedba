"""One generation taken apart: every velocity on the way from noise to latents, so that each can be compared."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sa3_convert.checkpoint.layout import CheckpointLayout
from sa3_convert.checkpoint.variants import defaults_of
from sa3_convert.errors import UsageError
from sa3_convert.runtime.conditioning import Conditioning, local_conditioning
from sa3_convert.runtime.lengths import lengths
from sa3_convert.runtime.noise import TorchGenerator
from sa3_convert.runtime.samplers import SAMPLERS
from sa3_convert.runtime.schedule import sigmas
from sa3_convert.session import Session
from sa3_convert.verify.prompts import PROMPTS

Floats = NDArray[np.float32]
Velocity = Callable[[Floats, np.float32], Floats]

_OTHER_STREAM = 1 << 31
_SEEDS = 1 << 64


@dataclass(frozen=True, slots=True)
class GenerationCase:
    """What is generated; its name says all of it.

    Raises:
        UsageError: there is no prompt of that number, or the seed does not fit into 64 bits.

    """

    prompt: int
    """Index into `PROMPTS`."""
    seed: int
    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.prompt < len(PROMPTS):
            raise UsageError(f"There is no prompt {self.prompt}; prompts are 0 to {len(PROMPTS) - 1}.")
        if not 0 <= self.seed < _SEEDS:
            raise UsageError(f"Seed {self.seed} is not within 0 … 2⁶⁴ − 1.")

    @property
    def name(self) -> str:
        """A name that `parse` reads back."""
        seconds = np.format_float_positional(self.seconds, trim="-")
        return f"prompt={self.prompt} seed={self.seed} seconds={seconds}"

    @property
    def text(self) -> str:
        """The prompt itself."""
        return PROMPTS[self.prompt]

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the case of a name.

        Raises:
            UsageError: it is no such name, or there is no prompt of that number.

        """
        found = re.fullmatch(r"prompt=(\d{1,3}) seed=(\d{1,20}) seconds=(\d{1,9}(?:\.\d+)?)", name.strip(), re.ASCII)
        if found is None or int(found[1]) >= len(PROMPTS):
            raise UsageError(
                f"{name!r} is no case. Write 'prompt=0 seed=1 seconds=5', with a prompt from 0 to {len(PROMPTS) - 1}."
            )
        return cls(int(found[1]), int(found[2]), float(found[3]))


def all_cases(prompts: Sequence[int], seeds: Sequence[int], seconds: Sequence[float]) -> tuple[GenerationCase, ...]:
    """Return every combination."""
    return tuple(GenerationCase(p, s, n) for n in seconds for p in prompts for s in seeds)


@dataclass(frozen=True)
class Trajectory:
    """One pass of the denoising loop with one velocity evaluation a step."""

    inputs: tuple[Floats, ...] = field(repr=False)
    """What the velocity was asked for, [1, C, T] a step."""
    times: tuple[np.float32, ...]
    velocities: tuple[Floats, ...] = field(repr=False)
    latents: tuple[Floats, ...] = field(repr=False)
    """After each step; the last is the result."""
    valid: int
    """Latents that are not padding."""

    @property
    def result(self) -> Floats:
        """The final latents, [1, C, T]."""
        return self.latents[-1]


def denoised(
    velocity: Velocity, layout: CheckpointLayout, case: GenerationCase, *, steps: int, nudge: float = 0.0
) -> Trajectory:
    """Run the model's own default sampler, without guidance, and keep everything.

    Args:
        velocity: of the model, under the case's conditioning.
        layout: the checkpoint's dimensions.
        case: gives seed and duration.
        steps: of the schedule.
        nudge: standard deviation of what is added to every draw of noise, from a stream of its own. To every draw,
            because ping-pong forgets its start noise at the first step.

    Raises:
        UsageError: the duration is beyond the model's limit.

    """
    sizes = lengths(layout, case.seconds)
    generator, other = TorchGenerator(case.seed), TorchGenerator((case.seed + _OTHER_STREAM) % _SEEDS)

    def noise(shape: Sequence[int]) -> Floats:
        drawn = generator.randn(shape)
        return drawn + np.float32(nudge) * other.randn(shape) if nudge else drawn

    start = noise((1, layout.autoencoder.latent_dim, sizes.latents))
    inputs: list[Floats] = []
    times: list[np.float32] = []
    velocities: list[Floats] = []

    def recorded(x: Floats, t: np.float32) -> Floats:
        inputs.append(x)
        times.append(t)
        velocities.append(velocity(x, t))
        return velocities[-1]

    sampler = SAMPLERS[defaults_of(layout).sampler]
    latents = tuple(step.latents for step in sampler(recorded, start, sigmas(steps), noise))
    return Trajectory(tuple(inputs), tuple(times), tuple(velocities), latents, sizes.valid)


def replayed(
    velocities: Sequence[Floats], layout: CheckpointLayout, case: GenerationCase, *, nudge: float = 0.0
) -> Trajectory:
    """Return the trajectory of which only the velocities were kept; everything else follows from them."""
    rest = iter(velocities)
    return denoised(lambda x, t: next(rest), layout, case, steps=len(velocities), nudge=nudge)


def velocity_of(dit: Session, layout: CheckpointLayout, case: GenerationCase, condition: Conditioning) -> Velocity:
    """Return the DiT's velocity under a conditioning."""
    constant = dit_constants(layout, case, condition)

    def velocity(x: Floats, t: np.float32) -> Floats:
        return dit.run({"x": x, "t": np.array([t], np.float32), **constant})["out"]

    return velocity


def dit_constants(layout: CheckpointLayout, case: GenerationCase, condition: Conditioning) -> dict[str, Floats]:
    """Return those of the DiT's inputs that are the same in all steps."""
    sizes = lengths(layout, case.seconds)
    return {
        "cross_attn_cond": condition.cross_attn_cond,
        "global_embed": condition.global_embed,
        "local_add_cond": local_conditioning(layout.autoencoder.latent_dim, sizes.latents),
        "padding_mask": sizes.padding_mask(),
    }
