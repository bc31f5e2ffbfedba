"""How far each figure may move before it counts as drift, and why that far.

**Ratios in dB** are taken over the same cases on both sides, so what differs between cases cancels. Every ratio above
`CLAIM_CEILING_DB` counts as that much: beyond it the error is rounding of float arithmetic. A figure F may fall by

    scatter + arithmetic,    arithmetic = 10·log10(1 + 10^((F − 90 dB) / 10))

- *scatter*: two roundings of the same weights that are equally good differ as two draws of noise do, by about what the
  figures differ between seeds of the same prompt and duration: s, the standard deviation within such groups (over all
  cases where an input does not depend on the seed), pooled. A mean of n of them may fall by 3·s/√n; a 5 % point by
  3·2.11·s/√n (the standard error of that point of a normal distribution); the worst by 3·s. Each is held between a
  least (a change too small to act on, far above what machines differ by) and a most: for a mean 0.1 to 0.5 dB, so that
  a loss of 1 dB is found whatever the scatter.
- *arithmetic*: engines round differently on other processors. That noise lies 90 dB or more below the signal
  (MNN and ONNX Runtime agree to 104 dB and better in fp32) and adds to the error that is there: nothing at 30 to 45 dB,
  0.02 dB at 66 dB, 0.4 dB at the ceiling.

**Sizes** may grow by 1 % and 4 KiB: names and structure. **Storage** may not change. **Speed** (MNN's time over ONNX
Runtime's, a median of interleaved pairs) may grow by half, or by three times the scatter of its pairs if that is more
(at most threefold), and is judged only on the kind of processor that the baseline was made on.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import numpy as np

from sa3_convert.verify.result import CLAIM_CEILING_DB

Statistic = Literal["mean", "5 %", "worst"]

ARITHMETIC_DB: Final = 90.0
_SIGMAS: Final = 3.0
_QUANTILE_ERROR: Final = 2.11
"""√(p·(1 − p)) / φ(z_p) at p = 0.05."""
_BOUNDS: Final[dict[Statistic, tuple[float, float]]] = {"mean": (0.1, 0.5), "5 %": (0.2, 1.0), "worst": (0.3, 2.0)}
_SIZE_SHARE: Final = 0.01
_SIZE_BYTES: Final = 4096
_SPEED_SHARE: Final = 0.5
_SPEED_MOST: Final = 2.0
_NORMAL_MAD: Final = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation, which one outlier does not move."""

FORMULA: Final = (
    "A ratio may fall by k·s + 10·log10(1 + 10^((F − 90 dB)/10)): s its standard deviation between seeds, k = 3/√n for "
    "a mean of n (0.1 to 0.5 dB), 6.3/√n for the 5 % point (0.2 to 1 dB), 3 for the worst (0.3 to 2 dB); ratios count "
    f"up to {CLAIM_CEILING_DB:g} dB. A size may grow by 1 % and 4 KiB, speed by half, storage may not change."
)


def counted(ratios: Iterable[float]) -> list[float]:
    """Return ratios as they count: at most the ceiling."""
    return [min(ratio, CLAIM_CEILING_DB) for ratio in ratios]


def scatter(groups: Iterable[Sequence[float]]) -> float:
    """Return the pooled standard deviation within groups, in dB; 0 when no group has two members."""
    members = [np.asarray(group, np.float64) for group in groups if len(group) > 1]
    freedom = sum(group.size - 1 for group in members)
    if not freedom:
        return 0.0
    return math.sqrt(sum(float(((group - group.mean()) ** 2).sum()) for group in members) / freedom)


def may_fall_by(statistic: Statistic, value: float, count: int, deviation: float) -> float:
    """Return how much a ratio may fall, in dB; see the module.

    Args:
        statistic: which figure of a distribution.
        value: the figure, in dB.
        count: how many observations it is made of.
        deviation: between seeds, in dB.

    """
    factor = {"mean": 1 / math.sqrt(count), "5 %": _QUANTILE_ERROR / math.sqrt(count), "worst": 1.0}[statistic]
    least, most = _BOUNDS[statistic]
    arithmetic = 10 * math.log10(1 + 10 ** ((value - ARITHMETIC_DB) / 10))
    return min(max(_SIGMAS * factor * deviation, least), most) + arithmetic


def size_may_grow_by(size: int) -> float:
    """Return how many bytes a file may grow by."""
    return _SIZE_SHARE * size + _SIZE_BYTES


def speed_may_grow_by(ratio: float, ratios: Sequence[float]) -> float:
    """Return how much a ratio of times may grow, from the repeats that it is the median of; see the module."""
    deviation = _NORMAL_MAD * statistics.median(abs(r - ratio) for r in ratios)
    return min(max(_SPEED_SHARE * ratio, _SIGMAS * deviation), _SPEED_MOST * ratio)
