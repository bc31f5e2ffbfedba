"""The grid that MNN's converter rounds weights to, and least-squares scales on that same grid.

MNN 3.6.1 stores a group of weights (an output channel, or a block of input channels of it) as codes on a uniform grid:

- asymmetric: w ≈ lo + step·k, k = 0 … 2^b − 1, with lo = min(w) and step = (max(w) − min(w)) / (2^b − 1);
- symmetric:  w ≈ step·k, |k| ≤ 2^(b−1) − 1, with step = max|w| / (2^(b−1) − 1).

Grids set by the extremes waste levels on the few largest weights. Here lo and step are chosen for least squared error,
and the weights are replaced by the grid's values. Because both ends of the grid then occur among the values
(asymmetric: its lowest and highest, symmetric: its largest magnitude), the converter finds the very same grid and its
own rounding changes nothing. A group in which a chosen grid would lose its ends keeps the converter's own.

MNN can store lo and step as float16. It cuts their last bits off after it has chosen the codes, which shifts levels.
The search then goes only through grids whose numbers have float16's 11 bits, so what was planned still is what is
stored: `passes.weights` lifts channels whose numbers are too small for all of them by powers of two, before or after.

The search alternates, from several clipped starts, between rounding to the nearest level and the closed-form least
squares fit of (lo, step) or step to the codes (Lloyd's iteration restricted to uniform grids).
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import torch

from sa3_convert.arrays import Floats
from sa3_convert.recipe import WeightScheme

STARTS: Final = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5, 0.4)
"""Shares of the full range from which the search starts; low ones matter for heavy tails."""
ITERATIONS: Final = 6
_WEIGHTS_AT_ONCE: Final = 1 << 17
_HALF_MANTISSA: Final = 1 << 11
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Grid:
    """How a weight is cut into groups and how many levels each has."""

    bits: int
    symmetric: bool
    block_size: int | None
    """Input channels per group; None, or a size that the converter does not honour, means whole output channels."""
    half_scales: bool = False
    """Whether lo and step are stored as float16."""

    def group_length(self, shape: tuple[int, ...]) -> int:
        """Return the number of weights that share a scale, for a weight of shape [out, in, *kernel].

        The converter honours a block size that is at least 16, a multiple of 16, and divides the input channels.
        """
        kernel = math.prod(shape[2:])
        block = self.block_size
        if block is None or block < 16 or block % 16 or shape[1] % block:
            return shape[1] * kernel
        return block * kernel

    @property
    def top(self) -> int:
        """Return the highest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def bottom(self) -> int:
        """Return the lowest code."""
        return -self.top if self.symmetric else 0


def grid_for(scheme: WeightScheme, layer: str) -> Grid | None:
    """Return the grid that a scheme gives a layer; None keeps it in floating point."""
    bits, block_size = scheme.for_layer(layer)
    return None if bits is None else Grid(bits, scheme.symmetric, block_size, half_scales=scheme.scales == "fp16")


def round_least_squares(weight: Floats, grid: Grid) -> Floats:
    """Return the weight on the grid of least squared error that the converter reproduces; shape [out, in, *kernel]."""
    return _by_rows(weight, grid, lambda rows: to_grid(rows, *least_squares_grid(rows, grid), grid))


def least_squares_grid(rows: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (lo, step), [groups, 1] each, of least squared error per row of [groups, length]; lo is 0 if symmetric.

    With 8 bits further starts are worth 0.01 dB at the most, of heavy tails too.
    """
    ends = torch.cat((rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)), dim=1)
    first_lo, first_step = (_storable(number, grid) for number in _extreme_grid(rows, grid))
    best_lo, best_step = first_lo, first_step
    _, best_error = _codes_and_error(rows, first_lo, first_step, grid)
    for start in STARTS if grid.bits < 8 else STARTS[:1]:
        if grid.symmetric:
            lo, step = first_lo, first_step * start
        else:
            step = first_step * start
            lo = first_lo + (first_step - step) * (grid.top / 2)
        codes = _codes(rows, lo, step, grid)
        for _ in range(ITERATIONS):
            lo, step = (_storable(number, grid) for number in _fit(rows, codes, lo, step, grid))
            codes, error = _codes_and_error(rows, lo, step, grid)
            better = (error < best_error) & _reproducible(_codes(ends, lo, step, grid), grid)
            best_error = torch.where(better, error, best_error)
            best_lo = torch.where(better, lo, best_lo)
            best_step = torch.where(better, step, best_step)
    return best_lo, best_step


def _by_rows(weight: Floats, grid: Grid, rounded: Callable[[torch.Tensor], torch.Tensor]) -> Floats:
    length = grid.group_length(weight.shape)
    flat = torch.from_numpy(np.array(weight, dtype=np.float32)).reshape(-1, length)
    result = torch.empty_like(flat)
    step = max(1, _WEIGHTS_AT_ONCE // length)

    def fill(start: int) -> None:
        result[start : start + step] = rounded(flat[start : start + step])

    # Pieces that stay in a processor's cache.
    in_parallel(fill, range(0, len(flat), step))
    values: Floats = result.reshape(weight.shape).numpy()
    return values


def in_parallel(work: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """Return what is made of each item, one thread for each: what torch would hand to others of it is too small.

    Nothing depends on how many threads there are, and none waits for another that other processes keep from running.
    """

    def make(item: Item) -> Made:
        with torch.no_grad():
            return work(item)

    with one_thread() as threads, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(make, items))


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """Keep torch from handing small pieces to other threads, which takes many times as long as the work itself.

    Yields the number of threads that torch may use outside.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _extreme_grid(rows: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    if grid.symmetric:
        peak = rows.abs().amax(dim=1, keepdim=True)
        return torch.zeros_like(peak), peak / grid.top
    lo, hi = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    return lo, (hi - lo) / grid.top


def _storable(numbers: torch.Tensor, grid: Grid) -> torch.Tensor:
    if not grid.half_scales:
        return numbers
    mantissas, exponents = torch.frexp(numbers)
    return torch.ldexp(mantissas.mul_(_HALF_MANTISSA).round_(), exponents).div_(_HALF_MANTISSA)


def _codes(rows: torch.Tensor, lo: torch.Tensor, step: torch.Tensor, grid: Grid) -> torch.Tensor:
    safe = torch.where(step > 0, step, torch.ones_like(step))
    return (rows - lo).div_(safe).round_().clamp_(grid.bottom, grid.top)


def to_grid(rows: torch.Tensor, lo: torch.Tensor, step: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return every weight's nearest value on its row's grid, [groups, length]."""
    return lo + step * _codes(rows, lo, step, grid)


def _codes_and_error(
    rows: torch.Tensor, lo: torch.Tensor, step: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = _codes(rows, lo, step, grid)
    error = (codes * step).add_(lo).sub_(rows).square_().sum(dim=1, keepdim=True)
    return codes, error


def _fit(
    rows: torch.Tensor, codes: torch.Tensor, lo: torch.Tensor, step: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares of w ≈ lo + step·k over lo and step; rows whose codes are all equal keep what they have."""
    if grid.symmetric:
        energy = codes.square().sum(dim=1, keepdim=True)
        fitted = (rows * codes).sum(dim=1, keepdim=True) / energy.clamp_min(1)
        return lo, torch.where(energy > 0, fitted, step)
    mean_code, mean_row = codes.mean(dim=1, keepdim=True), rows.mean(dim=1, keepdim=True)
    centred = codes - mean_code
    energy = centred.square().sum(dim=1, keepdim=True)
    fitted = (centred * rows).sum(dim=1, keepdim=True) / energy.clamp_min(1e-12)
    usable = (energy > 0) & (fitted > 0)
    fitted = torch.where(usable, fitted, step)
    return torch.where(usable, mean_row - fitted * mean_code, lo), fitted


def _reproducible(ends: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Tell which rows keep the ends of their grid, so that the converter finds the same one.

    Codes rise with the weights: those of a row's least and greatest, [groups, 2], are its lowest and highest.
    """
    lowest, highest = ends[:, :1], ends[:, 1:]
    if grid.symmetric:
        return torch.maximum(-lowest, highest) == grid.top
    kept: torch.Tensor = (lowest == grid.bottom) & (highest == grid.top)
    return kept
