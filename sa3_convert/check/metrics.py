"""How far one array is from another: signal-to-noise ratio, cosine, absolute errors. And how sure a count is.

The sums are kept in float64 and taken over pieces of bounded size, so no metric overflows on float16 or float32 and a
long piece of audio costs no copy of itself. Nothing is judged here: a comparator has no tolerance of its own.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.errors import VerificationError

MAX_DB = 300.0
"""Bound of every signal-to-noise ratio, both ways; what identical arrays get.

An infinite ratio has no place in JSON. No error of float32 arithmetic that matters lies beyond: one unit in the last
place of every element is 138 dB or more.
"""

_CONFIDENCE = 0.95
_PIECE = 1 << 17
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32))


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Figures of a target against its reference; all finite."""

    signal_to_noise_db: float
    """10·log10(Σ reference² / Σ (target − reference)²), within ±`MAX_DB`."""
    cosine: float
    """Of the angle between the two as vectors, mean not removed; 1 if both are zero, 0 if one is."""
    max_abs_error: float
    mean_abs_error: float


@dataclass(frozen=True, slots=True)
class Sums:
    """What the figures are made of; sums of several comparisons add up to one over all their elements."""

    count: int
    reference_energy: float
    target_energy: float
    error_energy: float
    product: float
    abs_error: float
    max_abs_error: float

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.count + other.count,
            self.reference_energy + other.reference_energy,
            self.target_energy + other.target_energy,
            self.error_energy + other.error_energy,
            self.product + other.product,
            self.abs_error + other.abs_error,
            max(self.max_abs_error, other.max_abs_error),
        )

    def fidelity(self) -> Fidelity:
        """Return the figures over everything that was summed."""
        return Fidelity(
            signal_to_noise_db=_decibels(self.reference_energy, self.error_energy),
            cosine=self._cosine(),
            max_abs_error=self.max_abs_error,
            mean_abs_error=self.abs_error / self.count,
        )

    def _cosine(self) -> float:
        if self.error_energy == 0:
            return 1.0
        if self.reference_energy == 0 or self.target_energy == 0:
            return 0.0
        # Two roots: the product of two energies can leave float64's range.
        cosine = self.product / (math.sqrt(self.reference_energy) * math.sqrt(self.target_energy))
        return max(-1.0, min(1.0, cosine))


def compare(reference: NDArray[Any] | None, target: NDArray[Any] | None, *, what: str = "output") -> Fidelity:
    """Return the figures of `target` against `reference`, both finite float16 or float32 of one shape."""
    return sums_of(reference, target, what=what).fidelity()


def sums_of(reference: NDArray[Any] | None, target: NDArray[Any] | None, *, what: str = "output") -> Sums:
    """Return the sums behind `compare`, which raises the same."""
    reference = _checked(reference, f"The reference's {what}")
    target = _checked(target, f"The target's {what}")
    if reference.shape != target.shape:
        raise VerificationError(
            f"The target's {what} has shape {list(target.shape)}, the reference's {list(reference.shape)}."
        )
    if reference.dtype != target.dtype:
        raise VerificationError(f"The target's {what} is {target.dtype}, the reference's {reference.dtype}.")
    flat_reference, flat_target = reference.reshape(-1), target.reshape(-1)
    total = Sums(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for start in range(0, flat_reference.size, _PIECE):
        piece = slice(start, start + _PIECE)
        total += _piece(flat_reference[piece].astype(np.float64), flat_target[piece].astype(np.float64))
    return total


def _checked(array: NDArray[Any] | None, whose: str) -> NDArray[Any]:
    if array is None:
        raise VerificationError(f"{whose} is missing.")
    if array.dtype not in _FLOATS:
        raise VerificationError(f"{whose} is {array.dtype}; only float16 and float32 can be compared.")
    if array.size == 0:
        raise VerificationError(f"{whose} is empty (shape {list(array.shape)}).")
    flat = array.reshape(-1)
    bad = sum(int(np.count_nonzero(~np.isfinite(flat[i : i + _PIECE]))) for i in range(0, flat.size, _PIECE))
    if bad:
        raise VerificationError(f"{whose} holds NaN or infinity in {bad} of {array.size} elements.")
    return array


def _piece(reference: NDArray[np.float64], target: NDArray[np.float64]) -> Sums:
    error = target - reference
    magnitude = np.abs(error)
    return Sums(
        count=reference.size,
        # Pairwise sums: BLAS would start threads for these, which fight with the engines'.
        reference_energy=float((reference * reference).sum()),
        target_energy=float((target * target).sum()),
        error_energy=float((error * error).sum()),
        product=float((reference * target).sum()),
        abs_error=float(magnitude.sum()),
        max_abs_error=float(magnitude.max()),
    )


def wilson(right: int, of: int) -> tuple[float, float]:
    """Return Wilson's interval, at 95 %, of the share that a count of right ones is of all."""
    z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    centre, width = right / of + z * z / (2 * of), math.sqrt(right * (of - right) / of**3 + (z / (2 * of)) ** 2)
    low, high = ((centre + sign * z * width) / (1 + z * z / of) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return MAX_DB
    if signal == 0:
        return -MAX_DB
    return max(-MAX_DB, min(MAX_DB, 10 * (math.log10(signal) - math.log10(noise))))
