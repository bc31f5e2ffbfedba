"""Error-compensated rounding: later weights make up for the rounding of earlier ones.

GPTQ (Frantar et al., 2022, arXiv:2210.17323), on the grid of `quantise.grid`: the columns (input channels) of a linear
are rounded one after the other, and each column's error is spread over the columns that are still free so that the
layer's output on calibration inputs changes least. With H = Σ x·xᵀ over the inputs and U the upper Cholesky factor of
H⁻¹, rounding column i with error e changes column j > i by −e·U[i,j] / U[i,i].

Columns of large diag(H) go first, while most columns are left to compensate. It helps as far as the inputs are
correlated; on white inputs it does nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from sa3_convert.quantise.grid import Floats, Grid, least_squares_grid, to_grid

DAMPING: Final = 0.01
"""Share of the mean of diag(H) that is added to it, so that directions which calibration did not excite stay put."""
_BLOCK: Final = 128


def round_error_compensated(weight: Floats, hessian: NDArray[np.float64], grid: Grid) -> Floats:
    """Return a linear's weight on the converter's grid with the least output error that GPTQ finds.

    Args:
        weight: [out, in] float32.
        hessian: [in, in], the sum of x·xᵀ over calibration inputs; any positive scale.
        grid: the grid of the file that will be written.

    Returns:
        [out, in] float32 that the converter's own rounding leaves as it is. Channels in which compensation would lose
        an end of the grid are rounded by least squares instead.

    Raises:
        ValueError: the shapes do not belong together.

    """
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"weight {weight.shape} and hessian {hessian.shape} do not belong together")
    original = torch.from_numpy(np.array(weight, dtype=np.float32))
    length = grid.group_length(weight.shape)
    rows = original.reshape(-1, length)
    lo, step = least_squares_grid(rows, grid)
    fallback = to_grid(rows, lo, step, grid)
    groups = weight.shape[1] // length
    # One column of (lo, step) per input channel, so that columns can be taken in any order.
    lo = lo.reshape(-1, groups).repeat_interleave(length, dim=1)
    step = step.reshape(-1, groups).repeat_interleave(length, dim=1)

    order = torch.argsort(torch.from_numpy(np.diag(hessian).copy()), descending=True)
    factor = _inverse_factor(torch.from_numpy(hessian)[order][:, order])
    with _one_thread():
        codes = _compensate(original[:, order].clone(), lo[:, order], step[:, order], factor, grid)
    codes = codes[:, torch.argsort(order)]
    values = (lo + step * codes).reshape(-1, length)
    kept = _has_both_ends(codes.reshape(-1, length), grid)
    result: Floats = torch.where(kept, values, fallback).reshape(weight.shape).numpy()
    return result


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch from handing single columns to other threads, which takes four times as long as the work itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the damped H⁻¹, float32."""
    damped = hessian.to(torch.float64)
    diagonal = damped.diagonal()
    diagonal += max(DAMPING * float(diagonal.mean()), torch.finfo(torch.float32).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
    return factor


def _compensate(
    weight: torch.Tensor, lo: torch.Tensor, step: torch.Tensor, factor: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the codes, column by column; updates beyond a block of columns are gathered into one product."""
    columns = weight.shape[1]
    codes = torch.empty_like(weight)
    safe = torch.where(step > 0, step, torch.ones_like(step))
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty(weight.shape[0], stop - start)
        for i in range(start, stop):
            column = weight[:, i]
            codes[:, i] = ((column - lo[:, i]) / safe[:, i]).round_().clamp_(grid.bottom, grid.top)
            error = (column - (lo[:, i] + step[:, i] * codes[:, i])) / factor[i, i]
            weight[:, i:stop] -= torch.outer(error, factor[i, i:stop])
            errors[:, i - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def _has_both_ends(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    if grid.symmetric:
        return codes.abs().amax(dim=1, keepdim=True) == grid.top
    return (codes.amin(dim=1, keepdim=True) == grid.bottom) & (codes.amax(dim=1, keepdim=True) == grid.top)
