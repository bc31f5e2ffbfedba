"""From noise to latents: schedules, samplers and guidance (APG), without a model in them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Floats

LOGSNR_AT_0: Final = 2.0
LOGSNR_SPAN: Final = 8.2


def sigmas(steps: int, sigma_max: float = 1.0) -> NDArray[np.float32]:
    """Return the schedule, [steps + 1] float32, falling from exactly `sigma_max` (at most 1: noise alone) to exactly 0.

    t = linspace(σmax, 0), then sigmoid of the negative log-SNR 2.0 − 8.2·t. Its end at t = 0, where the sigmoid is
    0.12, is set to 0, and its start to σmax. Source: the log-SNR shift of the published reference, in the form it has
    when a checkpoint gives no other.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps; at least 1 is needed")
    if not 0 < sigma_max <= 1:
        raise ValueError(f"sigma_max {sigma_max} is not within (0, 1]")
    times = _linspace_to_zero(sigma_max, steps + 1)
    logsnr = np.float32(LOGSNR_AT_0) - times * np.float32(LOGSNR_SPAN)
    # Rounded to float32 where the reference rounds: the DiT's highest time frequency is 10⁴, so last bits count.
    odds = np.exp(logsnr.astype(np.float64)).astype(np.float32)
    shifted: NDArray[np.float32] = np.float32(1) / (np.float32(1) + odds)
    shifted[-1] = 0
    shifted[0] = sigma_max
    return shifted


def _linspace_to_zero(start: float, points: int) -> NDArray[np.float32]:
    """Return torch's linspace(start, 0, points): each half counted from its own end, products not rounded."""
    first = np.float32(start)
    step = (np.float32(0) - first) / np.float32(points - 1)
    index = np.arange(points, dtype=np.float64)
    falling = np.float64(first) + np.float64(step) * index
    rising = -np.float64(step) * (points - 1 - index)
    return np.where(index < points // 2, falling, rising).astype(np.float32)


Velocity = Callable[[Floats, np.float32], Floats]
"""(latents [B, C, T], time) → velocity [B, C, T]; with it latents − time · velocity is the denoised estimate."""
Noise = Callable[[Sequence[int]], Floats]
"""shape → standard normal values."""
SamplerName = Literal["pingpong", "euler", "rk4", "dpmpp"]

_LEAST_TIME = np.float32(1e-10)


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
    """Denoise fully, then noise anew to the next time; for distilled models. Draws once a step, the last included."""
    x = start
    for i, (t, t_next) in enumerate(pairwise(sigmas)):
        denoised = x - t * velocity(x, t)
        x = (1 - t_next) * denoised + t_next * noise(x.shape)
        yield Step(i, float(t), x, denoised)


def euler(velocity: Velocity, start: Floats, sigmas: Floats, noise: Noise) -> Iterator[Step]:
    """First-order steps along the flow."""
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
        coefficient = (t_next - t) / (max(1 - t_next, _LEAST_TIME) * max(t, _LEAST_TIME))
        x = t_next / max(t, _LEAST_TIME) * x - (1 - t_next) * coefficient * estimate
        previous = (t, denoised)
        yield Step(i, float(t), x, denoised)


def _logsnr(t: np.float32) -> np.float32:
    ratio: np.float32 = np.log(max(1 - t, _LEAST_TIME) / max(t, _LEAST_TIME))
    return ratio


SAMPLERS: Mapping[SamplerName, Sampler] = {"pingpong": pingpong, "euler": euler, "rk4": rk4, "dpmpp": dpmpp}

_TINY = 1e-8


def guided(
    conditioned: Velocity, unconditioned: Velocity, *, cfg_scale: float, apg_scale: float, padding_mask: Floats
) -> Velocity:
    """Return a velocity function that evaluates both and blends them.

    `cfg_scale` 1 is the conditioned velocity alone; more moves away from the unconditioned one. `apg_scale` 0 keeps the
    whole difference, 1 only its part orthogonal to the conditioned estimate, projected and kept at valid positions
    alone (`padding_mask` [B, T], 1 = valid).
    """

    def velocity(x: Floats, t: np.float32) -> Floats:
        denoised = x - t * conditioned(x, t)
        difference = denoised - (x - t * unconditioned(x, t))
        if apg_scale != 0:
            orthogonal = _orthogonal(difference, denoised, padding_mask)
            weight = np.float32(apg_scale)
            difference = (weight * orthogonal + (1 - weight) * difference).astype(np.float32)
        return ((x - (denoised + np.float32(cfg_scale - 1) * difference)) / t).astype(np.float32)

    return velocity


def _orthogonal(vector: Floats, reference: Floats, padding_mask: Floats) -> Floats:
    """Return the part of `vector` [B, C, T] orthogonal to `reference` over valid positions, and 0 at the others."""
    mask = padding_mask[:, np.newaxis, :]
    masked = reference * mask
    norm = np.sqrt(np.sum(np.square(masked, dtype=np.float64), axis=(-2, -1), keepdims=True))
    direction = (masked / np.maximum(norm, _TINY)).astype(np.float32)
    length = np.sum(np.multiply(vector, direction, dtype=np.float64), axis=(-2, -1), keepdims=True)
    orthogonal: Floats = vector - length.astype(np.float32) * direction
    orthogonal *= mask
    return orthogonal
