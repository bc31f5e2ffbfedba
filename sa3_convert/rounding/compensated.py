"""Error-compensated rounding: each linear makes up for its own rounding and for what came before, front to back."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from sa3_convert.arrays import Floats
from sa3_convert.rounding.grid import Grid, in_parallel, least_squares_grid, round_least_squares, to_grid

RIDGE: Final = 1.0
"""r as a share of the mean of diag(H)."""
DAMPING: Final = 0.1
"""d as a share of the mean of diag(H): directions that calibration hardly excites stay put."""
_BLOCK: Final = 64
_PIECE: Final = 256
"""Columns of a product that are computed at a time: always the same, so that sums do not depend on threads."""
_TINY: Final = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class InputMoments:
    """Second moments of what reaches a linear over the same positions of both networks; any common positive scale."""

    rounded: Tensor
    """H = Σ x'·x'ᵀ, [in, in] float64, of the rounded network's inputs x'."""
    crossed: Tensor
    """C = Σ x·x'ᵀ, [in, in] float64, with the original network's inputs x."""

    @classmethod
    def of(cls, original: Tensor, rounded: Tensor) -> "InputMoments":
        """Sum up inputs [positions, in] float32 of the original and of the rounded network."""
        width = rounded.shape[1]
        products = torch.empty(2, width, width)

        def fill(start: int) -> None:
            stop = min(start + _PIECE, width)
            columns = rounded[:, start:stop]
            products[0, :stop, start:stop] = rounded[:, :stop].T @ columns
            products[1, :, start:stop] = original.T @ columns

        in_parallel(fill, range(0, width, _PIECE))
        upper, crossed = products.double()
        return cls(upper.triu() + upper.triu(1).T, crossed)

    @cached_property
    def solver(self) -> tuple[Tensor, Tensor]:
        """(C + rI)ᵀ and the Cholesky factor of H + rI, of which V follows."""
        ridge = _share_of_mean(self.rounded, RIDGE)
        return (self.crossed + ridge).T, torch.linalg.cholesky(self.rounded + ridge)

    @cached_property
    def compensation(self) -> tuple[Tensor, Tensor]:
        """The order in which input channels are rounded, and in it the upper Cholesky factor of (H + dI)⁻¹."""
        order = torch.argsort(self.rounded.diagonal(), descending=True)
        damped = (self.rounded + _share_of_mean(self.rounded, DAMPING))[order][:, order]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return order, torch.linalg.cholesky(inverse, upper=True).float()


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
    codes = _compensate(aim, _spread(lo, aim, length), _spread(step, aim, length), moments, grid)
    codes = codes.reshape(-1, length)
    values = torch.where(_has_both_ends(codes, grid), lo + step * codes, to_grid(rows, lo, step, grid))
    result: Floats = values.reshape(weight.shape).numpy()
    return result


def _aim(weight: Tensor, moments: InputMoments) -> Tensor:
    """Return V, [out, in] float32."""
    crossed, factor = moments.solver
    return torch.cholesky_solve(crossed @ weight.double().T, factor).T.float().contiguous()


def _share_of_mean(moments: Tensor, share: float) -> Tensor:
    """Return a multiple of the identity, never zero."""
    size = max(share * float(moments.diagonal().mean()), _TINY)
    return size * torch.eye(len(moments), dtype=moments.dtype)


def _spread(numbers: Tensor, weight: Tensor, length: int) -> Tensor:
    """Return one number per weight, [out, in], for one per group, so that columns can be taken in any order."""
    return numbers.reshape(weight.shape[0], -1).repeat_interleave(length, dim=1)


def _compensate(weight: Tensor, lo: Tensor, step: Tensor, moments: InputMoments, grid: Grid) -> Tensor:
    """Return the codes [out, in]; updates beyond a block of columns are gathered into one product."""
    order, factor = moments.compensation
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


Kept = Callable[[str, Callable[[], list[RoundedLinear]]], list[RoundedLinear]]
"""Returns a block's linears by its name: what was kept of them before, or what the function makes."""


def round_blocks(
    blocks: Mapping[str, nn.Module],
    fit: Sequence[Streams],
    check: Sequence[Streams],
    grid_of: GridOf,
    kept: Kept = lambda _, make: make(),
    tell: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[RoundedLinear]:
    """Round the linears of consecutive blocks in place, on samples to fit on and to check with, which advance too.

    Each block maps (state, *arguments) to the next state; a linear's grid is asked for by its full name. Samples run
    side by side, each on one thread. Told is how many blocks are done, and of how many.
    """
    samples = [*fit, *check]
    for number, (name, block) in enumerate(blocks.items()):
        tell(number, len(blocks))
        rounding = _BlockRounding(name, block, samples, len(fit))
        linears = kept(name, partial(rounding.make, grid_of))
        for linear in linears:
            _replace(block.get_submodule(linear.name.removeprefix(f"{name}.")), linear)
        rounding.advance()
        yield from linears


class _BlockRounding:
    """One block, and what it does with samples in the original network."""

    def __init__(self, name: str, block: nn.Module, samples: Sequence[Streams], fitted: int) -> None:
        self._name, self._block, self._samples, self._fitted = name, block, samples, fitted
        self._groups, self._ends = _groups(block, samples[0].original)
        firsts = [group[0] for group in self._groups]
        self._originals, self._states = _run(block, [sample.original for sample in samples], firsts)
        self._moved: list[Tensor] = []

    def make(self, grid_of: GridOf) -> list[RoundedLinear]:
        """Round its linears in place, in the order in which they run, those with the same input together."""
        calls = [sample.rounded for sample in self._samples]
        made: list[RoundedLinear] = []
        whole: dict[str, nn.Module] = {}
        for group in self._groups:
            reached = [first for first, *_ in reaching(self._block, group[0], [(x, *rest) for x, rest in calls])]
            original = self._originals.pop(group[0])
            linears = {f"{self._name}.{path}": self._block.get_submodule(path) for path in group}
            grids = {name: grid for name in linears if (grid := grid_of(name)) is not None}
            if grids:
                inputs = _Inputs(original, [x.flatten(0, -2) for x in reached], self._fitted)
                made += in_parallel(partial(inputs.rounded, linears, grids), grids)
            for linear in made[len(made) - len(grids) :]:
                _replace(linears[linear.name], linear)
            for path, module in zip(group, linears.values(), strict=True):
                end = self._ends.get(path, path)
                whole[end] = self._block.get_submodule(end)
                self._block.set_submodule(end, _Finished(in_parallel(module, reached)))
        _, self._moved = _run(self._block, calls, ())
        for path, module in reversed(whole.items()):
            self._block.set_submodule(path, module)
        return made

    def advance(self) -> None:
        """Take the samples to the next block, in the rounded network through what its linears are now."""
        moved = self._moved or _run(self._block, [sample.rounded for sample in self._samples], ())[1]
        for sample, state, moved_state in zip(self._samples, self._states, moved, strict=True):
            sample.original, sample.rounded = (state, sample.original[1]), (moved_state, sample.rounded[1])


def _replace(linear: nn.Module, rounded: RoundedLinear) -> None:
    linear.weight = nn.Parameter(torch.from_numpy(rounded.weight), requires_grad=False)


class _Inputs:
    """A linear's inputs in both networks, [positions, in] per sample; the first `fitted` samples are fitted on."""

    def __init__(self, original: list[Tensor], rounded: list[Tensor], fitted: int) -> None:
        self._moments = InputMoments.of(torch.cat(original[:fitted]), torch.cat(rounded[:fitted]))
        self._original, self._rounded = torch.cat(original[fitted:]), torch.cat(rounded[fitted:])

    def rounded(self, linears: Mapping[str, nn.Module], grids: Mapping[str, Grid], name: str) -> RoundedLinear:
        """Return what becomes of one linear: the better of two ways on the samples to check with."""
        linear = linears[name]
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach()
        original: Floats = weight.numpy()
        compensated = round_error_compensated(original, self._moments, grids[name])
        plain = round_least_squares(original, grids[name])
        wanted = self._original @ weight.T
        with_it, without = (self._error(wanted, replacement) for replacement in (compensated, plain))
        gain = 10 * math.log10((without + _NOTHING) / (with_it + _NOTHING))
        return RoundedLinear(name, compensated if gain > 0 else plain, gain)

    def _error(self, wanted: Tensor, replacement: Floats) -> float:
        """Return the energy of the output's error on the samples to check with."""
        difference = wanted - self._rounded @ torch.from_numpy(replacement).T
        return float(difference.square().sum(dtype=torch.float64))


class _Call(threading.local):
    """Which of the calls that are made side by side this thread is in."""

    number = -1


_call: Final = _Call()


class _Finished(nn.Module):
    """Stands for a module whose outputs are known, one for each call."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, *_: object) -> Tensor:
        return self._outputs[_call.number]


class _ReachedError(Exception):
    """A network has run as far as it had to."""


def _side_by_side(network: nn.Module, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """Return what a network makes of each call; nothing of those that were to run no further."""

    def run(number: int) -> Any:
        _call.number = number
        with contextlib.suppress(_ReachedError):
            return network(*calls[number])

    return in_parallel(run, range(len(calls)))


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


def reaching(network: nn.Module, path: str, calls: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return what reaches a module of a network in each call, which runs no further."""
    caught: list[tuple[Any, ...]] = [()] * len(calls)

    def catch(_: str, __: nn.Module, arguments: tuple[Any, ...]) -> None:
        caught[_call.number] = arguments
        raise _ReachedError

    with _watched(network, [path], catch):
        _side_by_side(network, calls)
    return caught


def _groups(block: nn.Module, call: Call) -> tuple[list[list[str]], dict[str, str]]:
    """Return the paths of a block's linears in the order in which they run, those with the same input together.

    Also of linears whose output is that of a module around them, by their paths, that of the outermost.
    """
    seen: dict[int, tuple[Tensor, list[str]]] = {}
    ends: dict[str, str] = {}
    made: dict[int, tuple[Tensor, str]] = {}
    linears = {path for path, module in block.named_modules() if isinstance(module, nn.Linear)}

    def note(path: str, _: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
        if path in linears:
            seen.setdefault(id(arguments[0]), (arguments[0], []))[1].append(path)
            made[id(output)] = output, path
        elif id(output) in made:
            ends[made[id(output)][1]] = path

    # Modules within others end before these.
    handles = [module.register_forward_hook(partial(note, path)) for path, module in block.named_modules() if path]
    try:
        block(call[0], *call[1])
    finally:
        for handle in handles:
            handle.remove()
    return [paths for _, paths in seen.values()], ends


def _run(
    block: nn.Module, calls: Sequence[Call], watched: Sequence[str]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Return what reached the watched linears, [positions, in] per call, and the states behind the block."""
    caught = {path: [torch.empty(0)] * len(calls) for path in watched}

    def catch(path: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught[path][_call.number] = arguments[0].flatten(0, -2)

    with _watched(block, watched, catch):
        states: list[Tensor] = _side_by_side(block, [(state, *rest) for state, rest in calls])
    return caught, states
