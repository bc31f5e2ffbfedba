"""Classifier-free guidance with adaptive projection (APG): two velocities become one.

Source: the published reference. The difference of the two denoised estimates is scaled and added to the conditioned
one; APG first takes out of it the part that is parallel to the conditioned estimate, which mostly adds loudness.
"""

import numpy as np
from numpy.typing import NDArray

from sa3_convert.runtime.samplers import Velocity

Floats = NDArray[np.float32]

_TINY = 1e-8


def guided(
    conditioned: Velocity, unconditioned: Velocity, *, cfg_scale: float, apg_scale: float, padding_mask: Floats
) -> Velocity:
    """Return a velocity function that evaluates both and blends them.

    Args:
        conditioned: velocity under the prompt.
        unconditioned: velocity without one, or under the negative prompt.
        cfg_scale: 1 is the conditioned velocity alone; more moves away from the unconditioned one.
        apg_scale: 0 keeps the whole difference, 1 only its part orthogonal to the conditioned estimate, and only at
            valid positions.
        padding_mask: [B, T] float32, 1 = valid; the projection is over valid positions.

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
