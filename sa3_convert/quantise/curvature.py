"""How much a component's output moves when single weights do: the diagonal of the Gauss-Newton matrix.

Rounding a weight matrix changes its entries by ΔW, small and as good as independent, so the energy that it adds at the
component's output y is Σ ΔW_ij²·C_ij with the curvature C_ij = ‖∂y/∂W_ij‖². For a probe v of independent random signs
E[(∂(vᵀy)/∂W_ij)²] = C_ij (Hutchinson, 1990): a single backward pass measures every weight of every layer at once, exact
in the expectation, and what tokens share (time and duration conditioning, memory tokens) is counted as it acts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import nn

from sa3_convert.quantise.grid import Floats
from sa3_convert.sealed import read_sealed, write_sealed
from sa3_convert.verify.inputs import Region, Sample

SAMPLED_ROWS: Final = 32
"""Output channels per layer, evenly spread, for which single weights are told apart."""
_ROWS: Final = "rows/"
_TOTAL: Final = "total/"
_DONE: Final = "done"
_LARGEST: Final = 4 << 30
"""Bytes of kept rows; the largest network has some hundred MB."""


@dataclass(frozen=True, slots=True)
class Curvature:
    """Curvature of one layer, summed over samples, each a share of its output's energy."""

    rows: Floats
    """[sampled rows, in·kernel], of the rows that `sampled_rows` selects."""
    total: float
    """Over all rows."""

    def error(self, difference: Floats) -> float:
        """Return the error that a change of the sampled rows stands for, if all rows are changed the same way.

        Args:
            difference: ΔW of the sampled rows, [sampled rows, in, *kernel].

        """
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


def measure_curvature(
    network: nn.Module,
    weights: Mapping[str, str],
    samples: Sequence[Sample],
    kept: Path,
    tick: Callable[[int, int], None],
) -> Curvatures:
    """Run one backward pass per sample, and keep what is known after each so that none is run twice.

    Args:
        network: the component's, fp32.
        weights: parameter name by layer name.
        samples: what the component meets in use.
        kept: file of intermediate results; it belongs to exactly these arguments.
        tick: told (passes done, of how many).

    Returns:
        The mean over the samples.

    """
    sums, done = _read(kept, weights)
    for index, sample in enumerate(samples):
        tick(index, len(samples))
        if index < done:
            continue
        sums = _add(sums, _squared_gradients(network, weights, sample, index))
        _write(kept, sums, index + 1)
    tick(len(samples), len(samples))
    share = np.float32(1 / len(samples))
    return {layer: Curvature(c.rows * share, c.total / len(samples)) for layer, c in sums.items()}


def _squared_gradients(network: nn.Module, weights: Mapping[str, str], sample: Sample, seed: int) -> Curvatures:
    """Return (∂(vᵀy)/∂W)² / ‖y‖² for one probe v; each gradient is reduced and freed as soon as it is there."""
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


def _add(first: Curvatures, second: Curvatures) -> Curvatures:
    if not first:
        return second
    return {layer: Curvature(first[layer].rows + c.rows, first[layer].total + c.total) for layer, c in second.items()}


def _write(path: Path, sums: Curvatures, done: int) -> None:
    tensors = {_ROWS + layer: np.ascontiguousarray(c.rows) for layer, c in sums.items()}
    totals = {_TOTAL + layer: np.array(c.total) for layer, c in sums.items()}
    write_sealed(path, save(tensors | totals | {_DONE: np.array(done)}))


def _read(path: Path, weights: Mapping[str, str]) -> tuple[Curvatures, int]:
    """Return what an interrupted measurement left; nothing if there is no such file or it is of no use."""
    try:
        kept = load(read_sealed(path, _LARGEST))
        found = {layer: Curvature(kept[_ROWS + layer].copy(), float(kept[_TOTAL + layer])) for layer in weights}
        return found, int(kept[_DONE])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return {}, 0
