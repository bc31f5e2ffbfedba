"""Times at which the denoising loop evaluates the velocity: evenly spaced in log-SNR, from σmax down to 0."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

_LOGSNR_AT_0: Final = 2.0
_LOGSNR_SPAN: Final = 8.2


def sigmas(steps: int, sigma_max: float = 1.0) -> NDArray[np.float32]:
    """Return the schedule, [steps + 1] float32, falling from exactly `sigma_max` to exactly 0.

    t = linspace(σmax, 0), then sigmoid of the negative log-SNR 2.0 − 8.2·t. Its end at t = 0, where the sigmoid is
    0.12, is set to 0, and its start to σmax. Source: the log-SNR shift of the published reference, in the form it has
    when a checkpoint gives no other.

    Args:
        steps: number of steps, at least 1.
        sigma_max: 0 < σmax ≤ 1; 1 starts from noise alone.

    """
    if steps < 1:
        raise ValueError(f"{steps} steps; at least 1 is needed")
    if not 0 < sigma_max <= 1:
        raise ValueError(f"sigma_max {sigma_max} is not within (0, 1]")
    times = _linspace_to_zero(sigma_max, steps + 1)
    logsnr = np.float32(_LOGSNR_AT_0) - times * np.float32(_LOGSNR_SPAN)
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
