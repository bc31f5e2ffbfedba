"""What rounding each layer costs at the component's output, measured, and how much single weights move it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file, save_file
from torch import nn

from sa3_convert.arrays import Floats
from sa3_convert.check.inputs import Region, Sample
from sa3_convert.lab.planner.allocation import Option
from sa3_convert.recipe import FloatType, ScaleType
from sa3_convert.rounding.grid import Grid, round_least_squares

SAMPLED_ROWS: Final = 32
"""Output channels per layer, evenly spread, for which single weights are told apart."""
_ROWS: Final = "rows/"
_TOTAL: Final = "total/"


@dataclass(frozen=True, slots=True)
class Curvature:
    """Curvature of one layer, summed over samples, each a share of its output's energy."""

    rows: Floats
    """[sampled rows, in·kernel], of the rows that `sampled_rows` selects."""
    total: float
    """Over all rows."""

    def error(self, difference: Floats) -> float:
        """Return the error that a change of the sampled rows, [rows, in, *kernel], stands for."""
        known = float(self.rows.sum(dtype=np.float64))
        if known == 0:
            return 0.0
        square = np.square(difference.reshape(self.rows.shape), dtype=np.float64)
        return float(np.einsum("ij,ij->", square, self.rows)) * self.total / known


Curvatures = dict[str, Curvature]
"""By layer name."""


def sampled_rows(weight: Floats) -> Floats:
    """Return the evenly spread rows of a weight [out, in, *kernel] that stand for all of them."""
    return weight[:: max(1, len(weight) // SAMPLED_ROWS)]


def curvatures_of(network: nn.Module, weights: Mapping[str, str], sample: Sample, seed: int) -> Curvatures:
    """Return (∂(vᵀy)/∂W)² / ‖y‖² for one probe v, by one backward pass.

    Each gradient is reduced and freed as soon as it is there.

    Args:
        network: of which no parameter requires a gradient.
        weights: parameter names by layer name.
        sample: what it runs on.
        seed: of the probe, whose elements are 1 or -1.

    """
    found: Curvatures = {}
    hooks = []
    for layer, name in weights.items():
        parameter = network.get_parameter(name)

        def reduce(parameter: torch.Tensor, layer: str = layer) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.reshape(len(parameter), -1)
            rows = gradient[:: max(1, len(gradient) // SAMPLED_ROWS)].square().numpy()
            found[layer] = Curvature(rows, float(gradient.square().sum(dtype=torch.float64)))
            parameter.grad = None

        hooks.append(parameter.requires_grad_(True).register_post_accumulate_grad_hook(reduce))  # type: ignore[no-untyped-call]
    try:
        feeds = [torch.from_numpy(np.ascontiguousarray(array)) for array in sample.feeds.values()]
        output = _judged(network(*feeds), sample.regions[0])
        signs = torch.randint(0, 2, output.shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        energy = output.detach().square().sum(dtype=torch.float64).sqrt()
        torch.autograd.backward((output * signs).sum() / energy)
    finally:
        for hook, name in zip(hooks, weights.values(), strict=True):
            hook.remove()
            network.get_parameter(name).requires_grad_(False)
    return found


def _judged(output: torch.Tensor, region: Region) -> torch.Tensor:
    """Return the part of an output that means something, as a view."""
    stop = output.shape[region.axis] if region.stop is None else region.stop
    return output.narrow(region.axis, region.start, stop - region.start)


def mean_of(samples: Iterable[Curvatures]) -> Curvatures:
    """Return the mean over samples; the same samples in the same order give the same bits."""
    each = iter(samples)
    sums, count = next(each), 1
    for own in each:
        sums = {layer: Curvature(c.rows + own[layer].rows, c.total + own[layer].total) for layer, c in sums.items()}
        count += 1
    share = np.float32(1 / count)
    return {layer: Curvature(c.rows * share, c.total / count) for layer, c in sums.items()}


def write_curvatures(path: Path, curvatures: Curvatures) -> None:
    """Write a safetensors file, whose name is a result's in the stage cache, which holds it to its hash."""
    tensors = {_ROWS + layer: np.ascontiguousarray(c.rows) for layer, c in curvatures.items()}
    totals = {_TOTAL + layer: np.array(c.total) for layer, c in curvatures.items()}
    save_file(tensors | totals, path)


def read_curvatures(path: Path) -> Curvatures:
    """Read what `write_curvatures` has written."""
    kept = load_file(path)
    layers = [name.removeprefix(_ROWS) for name in kept if name.startswith(_ROWS)]
    return {layer: Curvature(kept[_ROWS + layer], float(kept[_TOTAL + layer])) for layer in layers}


BLOCKS: Final = (None, 128, 64, 32)
BITS: Final = (2, 3, 4, 5, 6, 7, 8)


class LayerSensitivity(BaseModel):
    """Everything that was measured of one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    curvature: float
    """Energy at the component's output, as a share of its own, per squared change of each weight."""
    candidates: tuple[Option, ...]

    def options(self, floats: FloatType) -> list[Option]:
        """Return what `allocation.allocate` chooses from, if what stays in floating point is stored as `floats`."""
        exact = floats == "fp32"
        return [replace(c, size=2 * c.size, error=0.0) if c.bits is None and exact else c for c in self.candidates]


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
    """Return every precision of a layer [out, in, *kernel] with its size and predicted error."""
    rows = sampled_rows(weight)
    half = rows.astype(np.float16).astype(np.float32)
    found = [Option(bits=None, block_size=None, size=2 * weight.size, error=curvature.error(half - rows))]
    for grid in grids:
        # A block that is the whole channel, or that the converter does not honour, is no candidate of its own.
        if grid.block_size is None or grid.group_length(weight.shape) < math.prod(weight.shape[1:]):
            error = curvature.error(round_least_squares(rows, grid) - rows)
            size = stored_bytes(weight.shape, grid)
            found.append(Option(bits=grid.bits, block_size=grid.block_size, size=size, error=error))
    return LayerSensitivity(shape=tuple(weight.shape), curvature=curvature.total, candidates=tuple(found))


def all_grids(scales: ScaleType) -> list[Grid]:
    """Return the candidates of a plan: 2 to 8 bits, per channel and in blocks."""
    return [Grid(bits, False, block, half_scales=scales == "fp16") for bits in BITS for block in BLOCKS]
