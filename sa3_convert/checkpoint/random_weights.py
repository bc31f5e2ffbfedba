"""Seeded tensors of a given distribution, in bounded pieces.

`gaussian` follows `tensors.py` as it stands. `heavy-tailed` keeps every mean and variance but makes matrices and the
embedding look like trained ones, which rounding treats differently:

- values follow Student's t with 5 degrees of freedom, scaled to unit variance (kurtosis 9 instead of 3, and 20 to 45
  with the outliers of the next item);
- one input channel in 128 (at least one) is 3 to 6 times larger than the others, and one output channel in 128 is 2 to
  4 times larger; all channels are then scaled down together so that the mean square stays 1/fan_in. An embedding has
  outlier columns only: its rows are tokens, not channels.

Every tensor has a generator of its own, seeded by its name, so its values depend on no other tensor and no order.
Equal values across NumPy versions are not promised by NumPy itself (NEP 19).
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sa3_convert.checkpoint.tensors import (
    Constant,
    Embedding,
    Matrix,
    Normal,
    RotaryFrequencies,
    Shape,
    TensorSpec,
    Uniform,
)

Weights = Literal["gaussian", "heavy-tailed"]
Piece = NDArray[np.float32]

PIECE_ELEMENTS = 1 << 22
_FREEDOM = 5.0
_OUTLIER_SHARE = 128
_INPUT_OUTLIERS = (3.0, 6.0)
_OUTPUT_OUTLIERS = (2.0, 4.0)


def generator_for(*keys: str | int) -> np.random.Generator:
    """Return a generator that depends on the keys alone."""
    digest = hashlib.sha256("\0".join(str(key) for key in keys).encode()).digest()
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(int.from_bytes(digest, "little"))))


def pieces(spec: TensorSpec, weights: Weights, generator: np.random.Generator) -> Iterator[Piece]:
    """Yield a tensor's values in order, flat, in pieces of about `PIECE_ELEMENTS` float32."""
    match spec.distribution:
        case Constant(value):
            yield np.full(spec.elements, value, np.float32)
        case RotaryFrequencies(base):
            exponents = np.arange(spec.elements, dtype=np.float64) / spec.elements
            yield (base**-exponents).astype(np.float32)
        case Uniform(low, high):
            yield generator.uniform(low, high, spec.elements).astype(np.float32)
        case Normal(deviation, mean):
            yield from _gaussian(spec.shape, deviation, mean, generator)
        case Matrix(fan_in):
            deviation = fan_in**-0.5
            if weights == "gaussian":
                yield from _gaussian(spec.shape, deviation, 0.0, generator)
            else:
                yield from _heavy_tailed(spec.shape, deviation, generator, outlier_rows=True)
        case Embedding(deviation):
            if weights == "gaussian":
                yield from _gaussian(spec.shape, deviation, 0.0, generator)
            else:
                yield from _heavy_tailed(spec.shape, deviation, generator, outlier_rows=False)


def _gaussian(shape: Shape, deviation: float, mean: float, generator: np.random.Generator) -> Iterator[Piece]:
    left = math.prod(shape)
    while left:
        piece = generator.standard_normal(min(left, PIECE_ELEMENTS), dtype=np.float32)
        piece *= np.float32(deviation)
        piece += np.float32(mean)
        yield piece
        left -= piece.size


def _heavy_tailed(
    shape: Shape, deviation: float, generator: np.random.Generator, *, outlier_rows: bool
) -> Iterator[Piece]:
    rows, columns, kernel = shape[0], shape[1], math.prod(shape[2:])
    row_scale = _channel_scales(rows, _OUTPUT_OUTLIERS, generator) if outlier_rows else np.ones(rows, np.float32)
    column_scale = np.repeat(_channel_scales(columns, _INPUT_OUTLIERS, generator), kernel)
    # Student's t is a normal over the root of a gamma; its variance f/(f-2) is divided out in the same step.
    unit = np.float32((_FREEDOM - 2) / 2)
    step = max(1, PIECE_ELEMENTS // (columns * kernel))
    for start in range(0, rows, step):
        block = (min(step, rows - start), columns * kernel)
        piece = generator.standard_gamma(_FREEDOM / 2, block, dtype=np.float32)
        np.divide(unit, piece, out=piece)
        np.sqrt(piece, out=piece)
        piece *= generator.standard_normal(block, dtype=np.float32)
        piece *= column_scale
        piece *= row_scale[start : start + step, None] * np.float32(deviation)
        yield piece.reshape(-1)


def _channel_scales(channels: int, outliers: tuple[float, float], generator: np.random.Generator) -> Piece:
    """Return one factor per channel, a few of them large, with a mean square of exactly 1."""
    scales = np.ones(channels)
    chosen = generator.choice(channels, max(1, channels // _OUTLIER_SHARE), replace=False)
    scales[chosen] = generator.uniform(*outliers, chosen.size)
    scales /= np.sqrt(np.mean(scales**2))
    return scales.astype(np.float32)
