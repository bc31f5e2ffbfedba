"""Error-compensated rounding: each linear makes up for its own rounding and for what came before, front to back."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from sa3_convert.arrays import Floats
from sa3_convert.rounding.grid import Grid, least_squares_grid, one_thread, round_least_squares, to_grid

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
    """Return a linear's weight [out, in] on the converter's grid, with the least output error that is found.

    The converter's own rounding leaves it as it is: groups in which compensation would lose an end of the grid are
    rounded by least squares instead.
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


GridOf = Callable[[str], Grid | None]
"""The grid of a linear by its name; None keeps it as it is."""
_NOTHING: Final = 1e-30


Call = tuple[Tensor, Sequence[Any]]
"""What a block is called with: its state [1, positions, width], and what every block takes beside it."""


@dataclass(slots=True)
class Streams:
    """One sample on its way through the stack."""

    original: Call
    """In the original network."""
    rounded: Call
    """In the rounded one."""


@dataclass(frozen=True, slots=True)
class RoundedLinear:
    """What became of one linear."""

    name: str
    weight: Floats
    """[out, in], on its grid."""
    gain_db: float
    """How much compensation lowers the error of its output on held-out samples, against least squares."""

    @property
    def compensated(self) -> bool:
        """Whether compensation helped, and was kept."""
        return self.gain_db > 0


def round_blocks(
    blocks: Mapping[str, nn.Module], fit: Sequence[Streams], check: Sequence[Streams], grid_of: GridOf
) -> Iterator[RoundedLinear]:
    """Round the linears of consecutive blocks in place, on samples to fit on and to check with, which advance too.

    Each block maps (state, *arguments) to the next state; a linear's grid is asked for by its full name.
    """
    samples = [*fit, *check]
    for name, block in blocks.items():
        groups = _groups(block, samples[0].original)
        originals, states = _run(block, [sample.original for sample in samples], [group[0] for group in groups])
        finished: dict[str, _Finished] = {}
        for group in groups:
            moved = reaching(block, group[0], [(state, *rest) for state, rest in (one.rounded for one in samples)])
            inputs = _Inputs(originals.pop(group[0]), [first.flatten(0, -2) for first, *_ in moved], len(fit))
            for path in group:
                linear = block.get_submodule(path)
                yield from _replaced(linear, f"{name}.{path}", inputs, grid_of)
                finished[path] = _Finished(linear, len(samples))
                block.set_submodule(path, finished[path])
        _, moved_states = _run(block, [sample.rounded for sample in samples], ())
        for path, done in finished.items():
            block.set_submodule(path, done.linear)
        for sample, state, moved_state in zip(samples, states, moved_states, strict=True):
            sample.original, sample.rounded = (state, sample.original[1]), (moved_state, sample.rounded[1])


class _Inputs:
    """A linear's inputs in both networks, [positions, in] per sample; the first `fitted` samples are fitted on."""

    def __init__(self, original: list[Tensor], rounded: list[Tensor], fitted: int) -> None:
        self.moments = InputMoments.of(torch.cat(original[:fitted]), torch.cat(rounded[:fitted]))
        self._original, self._rounded = torch.cat(original[fitted:]), torch.cat(rounded[fitted:])

    def error(self, weight: Tensor, replacement: Floats) -> float:
        """Return the energy of the output's error on the samples to check with."""
        difference = self._original @ weight.T - self._rounded @ torch.from_numpy(replacement).T
        return float(difference.square().sum(dtype=torch.float64))


def _replaced(linear: nn.Module, name: str, inputs: _Inputs, grid_of: GridOf) -> Iterator[RoundedLinear]:
    """Round one linear in place, if it has a grid."""
    assert isinstance(linear, nn.Linear)
    grid = grid_of(name)
    if grid is None:
        return
    weight = linear.weight.detach()
    original: Floats = weight.numpy()
    with one_thread():
        plain = round_least_squares(original, grid)
        compensated = round_error_compensated(original, inputs.moments, grid)
    without, with_it = (inputs.error(weight, rounded) for rounded in (plain, compensated))
    gain = 10 * math.log10((without + _NOTHING) / (with_it + _NOTHING))
    rounded = RoundedLinear(name, compensated if gain > 0 else plain, gain)
    linear.weight = nn.Parameter(torch.from_numpy(rounded.weight), requires_grad=False)
    yield rounded


class _Finished(nn.Module):
    """A linear that stays as it is: what it gives for each sample is computed in the first pass over them and kept.

    Every pass takes the samples in the same order, and calls the linear once for each.
    """

    def __init__(self, linear: nn.Module, samples: int) -> None:
        super().__init__()
        self.linear = linear
        self._samples = samples
        self._calls = 0
        self._outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        index = self._calls % self._samples
        self._calls += 1
        if index == len(self._outputs):
            self._outputs.append(self.linear(x))
        return self._outputs[index]


class _ReachedError(Exception):
    """A network has run as far as it had to."""


@contextlib.contextmanager
def _watched(
    network: nn.Module, paths: Sequence[str], back: Callable[[str, nn.Module, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Call back before the modules at some paths of a network run."""
    handles = [network.get_submodule(path).register_forward_pre_hook(partial(back, path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reaching(network: nn.Module, path: str, calls: Iterable[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return what reaches a module of a network in each call, which runs no further."""
    caught: list[tuple[Any, ...]] = []

    def catch(_: str, __: nn.Module, arguments: tuple[Any, ...]) -> None:
        caught.append(arguments)
        raise _ReachedError

    with _watched(network, [path], catch):
        for arguments in calls:
            with contextlib.suppress(_ReachedError):
                network(*arguments)
    return caught


def _groups(block: nn.Module, call: Call) -> list[list[str]]:
    """Return the paths of a block's linears in the order in which they run, those with the same input together."""
    seen: dict[int, tuple[Tensor, list[str]]] = {}

    def note(path: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.setdefault(id(arguments[0]), (arguments[0], []))[1].append(path)

    linears = [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
    with _watched(block, linears, note):
        block(call[0], *call[1])
    return [paths for _, paths in seen.values()]


def _run(
    block: nn.Module, calls: Sequence[Call], watched: Sequence[str]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Return what reached the watched linears, [positions, in] per call, and the states behind the block."""
    caught: dict[str, list[Tensor]] = {path: [] for path in watched}
    with _watched(block, watched, lambda path, _, arguments: caught[path].append(arguments[0].flatten(0, -2))):
        states = [block(state, *arguments) for state, arguments in calls]
    return caught, states
