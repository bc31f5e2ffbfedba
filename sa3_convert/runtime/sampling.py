"""From noise to latents: seeded noise as torch's, schedules, samplers and guidance (APG), without a model in them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Floats

_BLOCK = 16
_HALF = _BLOCK // 2
_SEEDS = range(-(1 << 63), 1 << 64)


class TorchGenerator:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`.

    Any seed that torch takes will do; as in torch only its low 32 bits count.
    """

    def __init__(self, seed: int) -> None:
        if seed not in _SEEDS:
            raise ValueError(f"seed {seed} does not fit into 64 bits")
        self._bits = np.random.MT19937()
        # numpy's legacy seeding is the engine's original one (Matsumoto and Nishimura's init_genrand), as torch's is.
        self._bits.state = cast(Any, np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False))
        self._spare: float | None = None

    def randn(self, shape: Sequence[int]) -> Floats:
        """Return the next `torch.randn(shape)`, float32."""
        size = math.prod(shape)
        values = self._blocks(size) if size >= _BLOCK else self._pairs(size)
        return values.reshape(tuple(shape))

    def _blocks(self, size: int) -> Floats:
        """Fill blocks of 16; a last block that would be incomplete is drawn anew and overlaps the one before it."""
        uniforms = self._uniforms(size)
        whole = size - size % _BLOCK
        values = _normals(uniforms[:whole])
        if whole == size:
            return values
        return np.concatenate((values[: size - _BLOCK], _normals(self._uniforms(_BLOCK))))

    def _uniforms(self, size: int) -> Floats:
        draws = self._bits.random_raw(size)
        return (draws & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _pairs(self, size: int) -> Floats:
        return np.array([self._next_normal() for _ in range(size)], dtype=np.float32)

    def _next_normal(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle, radius = self._next_double(), self._next_double()
        radius = math.sqrt(-2 * math.log1p(-radius))
        self._spare = radius * math.sin(2 * math.pi * angle)
        return radius * math.cos(2 * math.pi * angle)

    def _next_double(self) -> float:
        high, low = (int(draw) for draw in self._bits.random_raw(2))
        return ((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53


def _normals(uniforms: Floats) -> Floats:
    """Turn uniforms, a multiple of 16, into normals block by block."""
    blocks = uniforms.reshape(-1, _BLOCK)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - blocks[:, :_HALF]))
    sine, cosine = _sine_and_cosine(np.float32(2 * math.pi) * blocks[:, _HALF:])
    return np.concatenate((radius * cosine, radius * sine), axis=1).reshape(-1)


def _fused(a: Floats | np.float32, b: Floats | np.float32, c: Floats | np.float32) -> Floats:
    """Return a·b + c rounded once to float32: the product of two float32 is exact in float64.

    The sum is rounded to float64 first, which changes the result once in about 10⁹ operations, by one unit.
    """
    fused = np.multiply(a, b, dtype=np.float64)
    fused += c
    return fused.astype(np.float32)


def _polynomial(x: Floats, coefficients: Sequence[float]) -> Floats:
    first, second, *rest = (np.float32(c) for c in coefficients)
    value = _fused(x, first, second)
    for coefficient in rest:
        value = _fused(value, x, coefficient)
    return value


# Cephes 2.2 single precision (S. Moshier): logf, sinf, cosf.
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_LN2_LOW, _LN2_HIGH = np.float32(-2.12194440e-4), np.float32(0.693359375)
_SQRT_HALF = np.float32(math.sqrt(0.5))
_SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_OCTANTS_PER_RADIAN = np.float32(4 / math.pi)
_MINUS_OCTANT = tuple(np.float32(part) for part in (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8))
_HALF_ONE, _ONE = np.float32(0.5), np.float32(1)


def _log(x: Floats) -> Floats:
    """Natural logarithm of 0 < x ≤ 1."""
    mantissa, exponent = np.frexp(x)
    below = mantissa < _SQRT_HALF
    e = (exponent - below).astype(np.float32)
    r = np.where(below, mantissa + mantissa, mantissa) - _ONE
    square = r * r
    tail = _fused(_polynomial(r, _LOG) * r, square, e * _LN2_LOW)
    return _fused(e, _LN2_HIGH, r + _fused(square, -_HALF_ONE, tail))


def _sine_and_cosine(angle: Floats) -> tuple[Floats, Floats]:
    """Sine and cosine of 0 ≤ angle < 2π."""
    octant = ((angle * _OCTANTS_PER_RADIAN).astype(np.int32) + 1) & ~1
    multiple = octant.astype(np.float32)
    r = angle
    for part in _MINUS_OCTANT:
        r = _fused(multiple, part, r)
    square = r * r
    cosine = _fused(_polynomial(square, _COSINE) * square, square, -(square * _HALF_ONE)) + _ONE
    sine = _fused(_polynomial(square, _SINE) * square, r, r)
    swapped = (octant & 2) != 0
    sine, cosine = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    sine = np.where((octant & 4) != 0, -sine, sine)
    cosine = np.where(((octant + 2) & 4) != 0, -cosine, cosine)
    return sine, cosine


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
