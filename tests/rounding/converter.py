"""What MNN's converter makes of weights, in plain float32 arithmetic: the oracle of grids that were planned ahead."""

import numpy as np

from sa3_convert.arrays import Floats
from sa3_convert.rounding.grid import Grid


def round_as_converter(weight: Floats, grid: Grid) -> Floats:
    """Return the weight as MNN's converter would store it; shape [out, in, *kernel]."""
    rows = np.array(weight, np.float32).reshape(-1, grid.group_length(weight.shape))
    if grid.symmetric:
        step = np.abs(rows).max(axis=1, keepdims=True) / np.float32(grid.top)
        lo = np.zeros_like(step)
    else:
        lo = rows.min(axis=1, keepdims=True)
        step = (rows.max(axis=1, keepdims=True) - lo) / np.float32(grid.top)
    codes = np.clip(np.round((rows - lo) / np.where(step > 0, step, np.float32(1))), grid.bottom, grid.top)
    if grid.half_scales:
        lo, step = _towards_zero(lo), _towards_zero(step)
    values: Floats = (lo + step * codes).astype(np.float32).reshape(weight.shape)
    return values


def _towards_zero(numbers: Floats) -> Floats:
    """Return what MNN keeps of float32 numbers as float16: the bits that fit, below 2⁻¹⁴ multiples of 2⁻²⁴."""
    cut = (numbers.view(np.int32) & ~0x1FFF).view(np.float32)
    small = np.trunc(numbers * np.float32(2.0**24)) / np.float32(2.0**24)
    return np.where(np.abs(numbers) < 2.0**-14, small, cut)
