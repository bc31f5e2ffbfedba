"""Error-compensated rounding of one linear: its rounded weight makes up for its own rounding and for what came before.

A linear of a rounded network meets inputs x' that rounding has already moved away from the original's x. Its weight W
is replaced by the Q on the grid that brings Q·x' nearest to W·x over calibration inputs, in two steps:

1. The aim V, free of any grid: least squares of ‖W·x − V·x'‖² with a ridge towards W (`RIDGE`), because what is left of
   the earlier errors in x' can be predicted only as far as there are inputs to learn it from.
   V = (W·C + r·W)·(H + r·I)⁻¹ with H = Σ x'·x'ᵀ and C = Σ x·x'ᵀ.
2. GPTQ (Frantar et al., 2022, arXiv:2210.17323) of V on the grid of `quantise.grid`: the columns (input channels) are
   rounded one after the other, and each column's error is spread over the columns that are still free so that the
   output changes least. With U the upper Cholesky factor of (H + d·I)⁻¹, rounding column i with error e changes column
   j > i by −e·U[i,j] / U[i,i]. Columns of large diag(H) go first, while most columns are left to compensate.

Both help as far as the inputs are correlated. The first step is the idea of asymmetric calibration (Li et al., 2025,
arXiv:2504.02692) in closed form.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sa3_convert.quantise.grid import Floats, Grid, least_squares_grid, to_grid

RIDGE: Final = 1.0
"""r as a share of the mean of diag(H)."""
DAMPING: Final = 0.1
"""d as a share of the mean of diag(H): directions that calibration hardly excites stay put."""
_BLOCK: Final = 64
_TINY: Final = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class InputMoments:
    """Second moments of what reaches a linear over the same positions of both networks; any common positive scale."""

    rounded: Tensor
    """H = Σ x'·x'ᵀ, [in, in] float64, of the rounded network's inputs x'."""
    crossed: Tensor
    """C = Σ x·x'ᵀ, [in, in] float64, with the original network's inputs x."""

    @classmethod
    def of(cls, original: Tensor, rounded: Tensor) -> "InputMoments":
        """Sum up inputs [positions, in] float32 of the original and of the rounded network."""
        return cls((rounded.T @ rounded).double(), (original.T @ rounded).double())


def round_error_compensated(weight: Floats, moments: InputMoments, grid: Grid) -> Floats:
    """Return a linear's weight on the converter's grid, with the least output error that is found.

    Args:
        weight: [out, in] float32.
        moments: of its inputs.
        grid: the grid of the file that will be written.

    Returns:
        [out, in] float32 that the converter's own rounding leaves as it is. Groups in which compensation would lose an
        end of the grid are rounded by least squares instead.

    Raises:
        ValueError: the shapes do not belong together.

    """
    if weight.ndim != 2 or moments.rounded.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"weight {weight.shape} and moments {tuple(moments.rounded.shape)} do not belong together")
    length = grid.group_length(weight.shape)
    aim = _aim(torch.from_numpy(weight.copy()), moments)
    rows = aim.reshape(-1, length)
    lo, step = least_squares_grid(rows, grid)
    codes = _compensate(aim, _spread(lo, aim, length), _spread(step, aim, length), moments.rounded, grid)
    codes = codes.reshape(-1, length)
    values = torch.where(_has_both_ends(codes, grid), lo + step * codes, to_grid(rows, lo, step, grid))
    result: Floats = values.reshape(weight.shape).numpy()
    return result


def _aim(weight: Tensor, moments: InputMoments) -> Tensor:
    """Return V, [out, in] float32."""
    ridge = _share_of_mean(moments.rounded, RIDGE)
    wanted = (moments.crossed + ridge).T @ weight.double().T
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(moments.rounded + ridge)).T.float().contiguous()


def _share_of_mean(moments: Tensor, share: float) -> Tensor:
    """Return a multiple of the identity, never zero."""
    size = max(share * float(moments.diagonal().mean()), _TINY)
    return size * torch.eye(len(moments), dtype=moments.dtype)


def _spread(numbers: Tensor, weight: Tensor, length: int) -> Tensor:
    """Return one number per weight, [out, in], for one per group, so that columns can be taken in any order."""
    return numbers.reshape(weight.shape[0], -1).repeat_interleave(length, dim=1)


def _compensate(weight: Tensor, lo: Tensor, step: Tensor, moments: Tensor, grid: Grid) -> Tensor:
    """Return the codes [out, in]; updates beyond a block of columns are gathered into one product."""
    order = torch.argsort(moments.diagonal(), descending=True)
    damped = (moments + _share_of_mean(moments, DAMPING))[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    # Input channels as rows: each is one piece of memory.
    left, lo, step = (numbers[:, order].T.contiguous() for numbers in (weight, lo, step))
    step = torch.where(step > 0, step, torch.ones_like(step))
    codes = torch.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            codes[i] = ((left[i] - lo[i]) / step[i]).round_().clamp_(grid.bottom, grid.top)
            errors[i - start] = (left[i] - (lo[i] + step[i] * codes[i])) / factor[i, i]
            left[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return codes[torch.argsort(order)].T.contiguous()


def _has_both_ends(codes: Tensor, grid: Grid) -> Tensor:
    if grid.symmetric:
        return codes.abs().amax(dim=1, keepdim=True) == grid.top
    return (codes.amin(dim=1, keepdim=True) == grid.bottom) & (codes.amax(dim=1, keepdim=True) == grid.top)
