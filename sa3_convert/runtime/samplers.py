"""From noise to latents along a schedule: the samplers, without a model in them.

Each is a generator over a velocity function: it yields after every step, so a caller can report, stop or stream. All
take noise last; only ping-pong draws from it. Times and weights stay float32, as in the published reference, which is
the source of the arithmetic. The schedule falls, so `dt` is negative.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Velocity = Callable[[Floats, np.float32], Floats]
"""(latents [B, C, T], time) → velocity [B, C, T]; with it latents − time · velocity is the denoised estimate."""
Noise = Callable[[Sequence[int]], Floats]
"""shape → standard normal values."""
SamplerName = Literal["pingpong", "euler", "rk4", "dpmpp"]

_TINY = np.float32(1e-10)


@dataclass(frozen=True, slots=True)
class Step:
    """What stands after one step."""

    index: int
    """Counted from 0."""
    sigma: float
    """The time at which the step started."""
    latents: Floats
    """[B, C, T]; of the last step: the result."""
    denoised: Floats
    """[B, C, T], the step's estimate of the result."""


Sampler = Callable[[Velocity, Floats, Floats, Noise], Iterator[Step]]


def pingpong(velocity: Velocity, start: Floats, sigmas: Floats, noise: Noise) -> Iterator[Step]:
    """Denoise fully, then noise anew to the next time; for distilled models. Draws once a step, the last included.

    Args:
        velocity: evaluated once a step.
        start: latents at time `sigmas[0]`, [B, C, T] float32.
        sigmas: falling times, [steps + 1] float32.
        noise: drawn from after every step.

    """
    x = start
    for i, (t, t_next) in enumerate(pairwise(sigmas)):
        denoised = x - t * velocity(x, t)
        x = (1 - t_next) * denoised + t_next * noise(x.shape)
        yield Step(i, float(t), x, denoised)


def euler(velocity: Velocity, start: Floats, sigmas: Floats, noise: Noise) -> Iterator[Step]:
    """First-order steps along the flow; arguments as for `pingpong`."""
    x = start
    for i, (t, t_next) in enumerate(pairwise(sigmas)):
        v = velocity(x, t)
        denoised = x - t * v
        x = x + (t_next - t) * v
        yield Step(i, float(t), x, denoised)


def rk4(velocity: Velocity, start: Floats, sigmas: Floats, noise: Noise) -> Iterator[Step]:
    """Classical Runge-Kutta of fourth order, four evaluations a step; arguments as for `pingpong`."""
    x = start
    for i, (t, t_next) in enumerate(pairwise(sigmas)):
        dt = t_next - t
        middle = t + dt / 2
        k1 = velocity(x, t)
        k2 = velocity(x + dt / 2 * k1, middle)
        k3 = velocity(x + dt / 2 * k2, middle)
        # Models are not trained at exactly 0.
        k4 = velocity(x + dt * k3, max(t_next, np.float32(1e-5)))
        denoised = x - t * k1
        x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        yield Step(i, float(t), x, denoised)


def dpmpp(velocity: Velocity, start: Floats, sigmas: Floats, noise: Noise) -> Iterator[Step]:
    """DPM-Solver++ of second order for rectified flow, one evaluation a step; arguments as for `pingpong`.

    The first and the last step are of first order.
    """
    x = start
    previous: tuple[np.float32, Floats] | None = None
    for i, (t, t_next) in enumerate(pairwise(sigmas)):
        denoised = x - t * velocity(x, t)
        estimate = denoised
        if previous is not None and t_next != 0:
            t_previous, denoised_previous = previous
            ratio = (_logsnr(t) - _logsnr(t_previous)) / (_logsnr(t_next) - _logsnr(t))
            weight = 1 / (2 * ratio)
            estimate = (1 + weight) * denoised - weight * denoised_previous
        coefficient = (t_next - t) / (max(1 - t_next, _TINY) * max(t, _TINY))
        x = t_next / max(t, _TINY) * x - (1 - t_next) * coefficient * estimate
        previous = (t, denoised)
        yield Step(i, float(t), x, denoised)


def _logsnr(t: np.float32) -> np.float32:
    ratio: np.float32 = np.log(max(1 - t, _TINY) / max(t, _TINY))
    return ratio


SAMPLERS: Mapping[SamplerName, Sampler] = {"pingpong": pingpong, "euler": euler, "rk4": rk4, "dpmpp": dpmpp}
