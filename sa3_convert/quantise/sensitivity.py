"""What rounding each layer costs at the component's output, at every precision that could be chosen for it.

For small errors the output's error is linear in the weights' own, so a candidate's error follows from what its rounding
does to single weights and from how much the output moves with each of them (`quantise.curvature`). Errors of different
layers are taken as independent: their energies add.

All of it is kept as JSON, keyed by what it depends on, so that the next plan for the same checkpoint costs nothing.
"""

import math
from collections.abc import Iterable
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict

from sa3_convert.quantise.allocation import Option
from sa3_convert.quantise.curvature import Curvature, sampled_rows
from sa3_convert.quantise.grid import Floats, Grid, round_least_squares
from sa3_convert.recipe import FloatType, ScaleType

BLOCKS: Final = (None, 128, 64, 32)
BITS: Final = (2, 3, 4, 5, 6, 7, 8)


class Candidate(BaseModel):
    """One precision of one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int | None
    """None is fp16."""
    block_size: int | None
    size: int
    """Bytes of codes, scales and offsets."""
    error: float
    """Predicted energy at the component's output, as a share of the output's own energy."""


class LayerSensitivity(BaseModel):
    """Everything that was measured of one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    curvature: float
    """Energy at the component's output, as a share of its own, per squared change of each weight."""
    candidates: tuple[Candidate, ...]

    def options(self, floats: FloatType) -> list[Option]:
        """Return what `allocation.allocate` chooses from, if what stays in floating point is stored as `floats`."""
        exact = floats == "fp32"
        return [
            Option(None, None, 2 * c.size, 0.0)
            if c.bits is None and exact
            else Option(c.bits, c.block_size, c.size, c.error)
            for c in self.candidates
        ]


class Sensitivity(BaseModel):
    """The measurements of one component."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    scales: ScaleType
    layers: dict[str, LayerSensitivity]


def stored_bytes(shape: tuple[int, ...], grid: Grid) -> int:
    """Return the bytes that MNN stores for a quantised weight: packed codes, and scales (and minima)."""
    count = int(np.prod(shape, dtype=np.int64))
    groups = count // grid.group_length(shape)
    numbers = groups * (1 if grid.symmetric else 2)
    return -(-count * grid.bits // 8) + numbers * (2 if grid.half_scales else 4)


def priced(weight: Floats, curvature: Curvature, grids: Iterable[Grid]) -> LayerSensitivity:
    """Return every precision of a layer with its size and predicted error.

    Args:
        weight: [out, in, *kernel].
        curvature: the layer's.
        grids: the integer precisions to price.

    """
    rows = sampled_rows(weight)
    half = rows.astype(np.float16).astype(np.float32)
    found = [Candidate(bits=None, block_size=None, size=2 * weight.size, error=curvature.error(half - rows))]
    for grid in grids:
        # A block that is the whole channel, or that the converter does not honour, is no candidate of its own.
        if grid.block_size is None or grid.group_length(weight.shape) < math.prod(weight.shape[1:]):
            error = curvature.error(round_least_squares(rows, grid) - rows)
            size = stored_bytes(weight.shape, grid)
            found.append(Candidate(bits=grid.bits, block_size=grid.block_size, size=size, error=error))
    return LayerSensitivity(shape=tuple(weight.shape), curvature=curvature.total, candidates=tuple(found))


def all_grids(scales: ScaleType) -> list[Grid]:
    """Return the candidates of a plan: 2 to 8 bits, per channel and in blocks."""
    return [Grid(bits, False, block, half_scales=scales == "fp16") for bits in BITS for block in BLOCKS]
