"""Seeded noise, the same as torch draws on the CPU, without torch."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

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
