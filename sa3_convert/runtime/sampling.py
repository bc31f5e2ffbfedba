"""From noise to latents: schedules, samplers and guidance (APG), without a model in them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Floats, double, host, placed_like, typed_like
from sa3_convert.checkpoint.dimensions import DEFAULT_SHIFT, FluxShift, FullShift, LogSnrShift, Shift


def sigmas(steps: int, sigma_max: float = 1.0, shift: Shift = DEFAULT_SHIFT, length: int = 1) -> NDArray[np.float32]:
    """Return the schedule, [steps + 1] float32, from exactly `sigma_max` (at most 1: noise alone) to exactly 0.

    t = linspace(σmax, 0), between whose ends each time is shifted; `length` is that of the wanted audio in latents.
    Rounded to float32 where the reference rounds: the DiT's highest time frequency is 10⁴, so last bits count. Source:
    the distribution shifts of the published reference.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps; at least 1 is needed")
    if not 0 < sigma_max <= 1:
        raise ValueError(f"sigma_max {sigma_max} is not within (0, 1]")
    # As torch's linspace: each half is counted from its own end, and no product is rounded.
    first, index = np.float32(sigma_max), np.arange(steps + 1, dtype=np.float64)
    step = np.float64((np.float32(0) - first) / np.float32(steps))
    falling, rising = first + step * index, -step * (steps - index)
    schedule: NDArray[np.float32] = np.where(index < (steps + 1) // 2, falling, rising).astype(np.float32)
    times, one = schedule[1:-1], np.float32(1)
    match shift:
        case LogSnrShift():
            end = np.float32(shift.logsnr_end)
            logsnr = end - times * (end - np.float32(shift.start(length)))
            times[:] = one / (one + np.exp(logsnr.astype(np.float64)).astype(np.float32))
        case FluxShift():
            alpha = np.float32(_flux_alpha(shift, length))
            times[:] = alpha * times / (one + (alpha - one) * times)
        case FullShift():
            share = (_clamped(length, shift) - shift.min_length) / (shift.max_length - shift.min_length)
            weight = np.float32(math.exp(-(shift.base_shift + (shift.max_shift - shift.base_shift) * share)))
            times[:] = one - weight / (weight + (one / (one - times) - one))
            if shift.use_sine:
                times[:] = np.sin(times * np.float32(math.pi) / np.float32(2))
    return schedule


def _flux_alpha(shift: FluxShift, length: int) -> float:
    """Return the factor of a length: alpha_min and alpha_max at the ends, straight in logarithms between them."""
    if shift.min_length == shift.max_length:
        return shift.alpha_min
    share = math.log(_clamped(length, shift) / shift.min_length) / math.log(shift.max_length / shift.min_length)
    return math.exp(math.log(shift.alpha_min) + share * math.log(shift.alpha_max / shift.alpha_min))


def _clamped(length: int, shift: FluxShift | FullShift) -> int:
    return min(max(length, shift.min_length), shift.max_length)


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
    x: Any
    """The latents, where the models work."""
    estimate: Any
    """The step's estimate of the result, there too."""

    @property
    def latents(self) -> Floats:
        """[B, C, T]; of the last step: the result."""
        return host(self.x)

    @property
    def denoised(self) -> Floats:
        """[B, C, T], the step's estimate of the result."""
        return host(self.estimate)


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


DRAWING: Final = frozenset({"pingpong"})
"""Samplers that draw noise anew in every step."""
SAMPLERS: Mapping[SamplerName, Sampler] = {"pingpong": pingpong, "euler": euler, "rk4": rk4, "dpmpp": dpmpp}


def evaluated(sampler: SamplerName, sigmas: Floats) -> list[float]:
    """Return the times at which a sampler evaluates the velocity on a schedule, in order."""
    found: list[float] = []

    def velocity(x: Floats, t: np.float32) -> Floats:
        found.append(float(t))
        return x

    for _ in SAMPLERS[sampler](velocity, np.zeros(1, np.float32), sigmas, lambda shape: np.zeros(shape, np.float32)):
        pass
    return found


_TINY = 1e-8


def guided(
    conditioned: Velocity,
    unconditioned: Velocity,
    *,
    cfg_scale: float,
    apg_scale: float,
    padding_mask: Floats,
    cfg_interval: tuple[float, float] = (0, 1),
    cfg_rescale: float = 0,
    cfg_norm_threshold: float = 0,
) -> Velocity:
    """Return a velocity function that evaluates both and blends them.

    Args:
        conditioned: under the prompt.
        unconditioned: without it, or under a negative prompt.
        cfg_scale: 1 is the conditioned velocity alone; more moves away from the unconditioned one.
        apg_scale: 0 keeps the whole difference, 1 only its part orthogonal to the conditioned estimate.
        padding_mask: [B, T], 1 = valid. Norms and projections are those of valid positions.
        cfg_interval: lowest and highest time at which there is guidance; at others `conditioned` is evaluated alone.
        cfg_rescale: how far the deviation over channels goes back to that of the conditioned velocity; 1 all the way.
        cfg_norm_threshold: the norm to which a longer difference is shortened before the projection; 0 is none.

    """
    low, high = cfg_interval
    mask: Any = None

    def velocity(x: Any, t: np.float32) -> Any:
        nonlocal mask
        alone = conditioned(x, t)
        if not low <= t <= high:
            return alone
        if mask is None:
            mask = placed_like(padding_mask[:, np.newaxis, :], x)
        denoised = x - t * alone
        difference = denoised - (x - t * unconditioned(x, t))
        if cfg_norm_threshold > 0:
            norm = _norm(difference * mask).clip(min=_TINY)
            difference = difference * typed_like((cfg_norm_threshold / norm).clip(max=1), x)
        if apg_scale != 0:
            weight = np.float32(apg_scale)
            difference = weight * _orthogonal(difference, denoised, mask) + (1 - weight) * difference
        blended = (x - (denoised + np.float32(cfg_scale - 1) * difference)) / t
        if cfg_rescale != 0:
            kept = _deviation(alone) / _deviation(blended).clip(min=_TINY)
            blended = blended * (1 + np.float32(cfg_rescale) * (kept - 1))
        return blended

    return velocity


def _deviation(values: Any) -> Any:
    """Return the standard deviation [B, 1, T] over channels, of a sample of them."""
    centred = values - values.mean(axis=1, keepdims=True)
    return ((centred * centred).sum(axis=1, keepdims=True) / (values.shape[1] - 1)) ** 0.5


def _norm(values: Any) -> Any:
    return (double(values) ** 2).sum(axis=(-2, -1), keepdims=True) ** 0.5


def _orthogonal(vector: Any, reference: Any, mask: Any) -> Any:
    """Return the part of `vector` [B, C, T] orthogonal to `reference` over valid positions, and 0 at the others."""
    masked = reference * mask
    direction = typed_like(masked / _norm(masked).clip(min=_TINY), masked)
    length = (double(vector) * double(direction)).sum(axis=(-2, -1), keepdims=True)
    return (vector - typed_like(length, vector) * direction) * mask
