"""What rounding each layer costs at the component's output, at every precision that could be chosen for it.

For small errors the output's error is linear in a layer's own error, so it splits into two factors that are measured
separately: the energy that rounding adds at the layer's output, exact for every candidate from the second moments M of
its inputs, tr(ΔW·M·ΔWᵀ); and the gain from there to the component's output, from running the network with that layer
rounded. Errors of different layers are taken as independent: their energies add.

All of it is kept as JSON, keyed by what it depends on, so that the next plan for the same checkpoint costs nothing.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import nn

from sa3_convert.quantise.allocation import Option
from sa3_convert.quantise.grid import Floats, Grid, round_as_converter, round_least_squares
from sa3_convert.quantise.moments import Moments, local_energy
from sa3_convert.verify.inputs import Sample

PROBE: Final = Grid(bits=4, symmetric=False, block_size=None)
"""The rounding with which gains are measured: large enough to stand out of float32, small enough to be linear."""
SAMPLED_ROWS: Final = 64
BLOCKS: Final = (None, 128, 64, 32)
BITS: Final = (2, 3, 4, 5, 6, 7, 8)


class Candidate(BaseModel):
    """One precision of one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int | None
    block_size: int | None
    size: int
    """Bytes of codes, scales and offsets."""
    error: float
    """Predicted energy at the component's output, as a share of the output's own energy."""


class LayerSensitivity(BaseModel):
    """Everything that was measured of one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    gain: float
    """Energy at the component's output per energy at the layer's output, both as shares of the signal there."""
    candidates: tuple[Candidate, ...]


class Sensitivity(BaseModel):
    """The measurements of one component."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    rounding: str
    layers: dict[str, LayerSensitivity]

    def options(self) -> dict[str, list[Option]]:
        """Return what `allocation.allocate` chooses from."""
        return {
            name: [Option(c.bits, c.block_size, c.size, c.error) for c in layer.candidates]
            for name, layer in self.layers.items()
        }


@dataclass(frozen=True, slots=True)
class _Baseline:
    sample: Sample
    feeds: tuple[torch.Tensor, ...]
    output: torch.Tensor
    energy: float


def stored_bytes(shape: tuple[int, ...], grid: Grid) -> int:
    """Return the bytes that MNN stores for a quantised weight: packed codes, and scales (and minima)."""
    count = int(np.prod(shape, dtype=np.int64))
    groups = count // grid.group_length(shape)
    numbers = groups * (1 if grid.symmetric else 2)
    return -(-count * grid.bits // 8) + numbers * (2 if grid.half_scales else 4)


def measure_gains(
    network: nn.Module, weights: Mapping[str, str], moments: Moments, samples: Sequence[Sample]
) -> Iterator[tuple[str, float]]:
    """Run the network once per layer and sample with that layer rounded.

    Args:
        network: the component's, fp32; its parameters are changed and put back.
        weights: parameter name by layer name.
        moments: Σ x·xᵀ by layer name, in use.
        samples: what the component meets in use.

    Yields:
        (layer name, output error as a share of the output's energy per energy at the layer's output).

    """
    baselines = [_baseline(network, sample) for sample in samples]
    for layer, parameter_name in weights.items():
        parameter = network.get_parameter(parameter_name)
        original = parameter.data
        rounded = torch.from_numpy(round_as_converter(original.numpy(), PROBE))
        local = local_energy((rounded - original).numpy(), moments.get(layer))
        parameter.data = rounded
        try:
            shares = [_error_share(network, baseline) for baseline in baselines]
        finally:
            parameter.data = original
        yield layer, float(np.mean(shares)) / local if local > 0 else 0.0


def candidates(
    weight: Floats, gain: float, moments: NDArray[np.float32] | None, grids: Iterable[Grid]
) -> tuple[Candidate, ...]:
    """Return every precision of a layer with its size and predicted error.

    The error of a large weight is taken from `SAMPLED_ROWS` of its output channels, evenly spread, and scaled up.
    """
    rows = weight[:: max(1, len(weight) // SAMPLED_ROWS)]
    factor = gain * len(weight) / len(rows)

    def made(bits: int | None, block: int | None, size: int, rounded: Floats) -> Candidate:
        error = factor * local_energy(rounded - rows, moments)
        return Candidate(bits=bits, block_size=block, size=size, error=error)

    found = [made(None, None, 2 * weight.size, rows.astype(np.float16).astype(np.float32))]
    for grid in grids:
        # A block that is the whole channel, or that the converter does not honour, is no candidate of its own.
        if grid.block_size is None or grid.group_length(weight.shape) < math.prod(weight.shape[1:]):
            size = stored_bytes(weight.shape, grid)
            found.append(made(grid.bits, grid.block_size, size, round_least_squares(rows, grid)))
    return tuple(found)


def all_grids(*, symmetric: bool = False) -> list[Grid]:
    """Return the candidates of a plan: 2 to 8 bits, per channel and in blocks."""
    return [Grid(bits, symmetric, block) for bits in BITS for block in BLOCKS]


def _baseline(network: nn.Module, sample: Sample) -> _Baseline:
    feeds = tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in sample.feeds.values())
    with torch.inference_mode():
        output = _valid(network(*feeds), sample)
    return _Baseline(sample, feeds, output, float(output.double().square().sum()))


def _error_share(network: nn.Module, baseline: _Baseline) -> float:
    with torch.inference_mode():
        output: Any = _valid(network(*baseline.feeds), baseline.sample)
    return float((output - baseline.output).double().square().sum()) / baseline.energy


def _valid(output: torch.Tensor, sample: Sample) -> torch.Tensor:
    region = sample.regions[0]
    stop = output.shape[region.axis] if region.stop is None else region.stop
    return output.narrow(region.axis, region.start, stop - region.start)
