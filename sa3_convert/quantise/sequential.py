"""Rounding a stack of blocks front to back, so that each linear sees what the already rounded network delivers.

Two streams go through the stack: the original's states and the rounded network's. Per block, the original runs once
while the inputs of its linears are kept; then the linears are rounded in the order in which they run, those that share
an input together, and the rounded block runs up to each of them to see what reaches it by then. What a rounded linear
gives is kept until the block is done, so that only what lies between linears is computed again.

Some samples are held out: a linear keeps its compensated weight only if that lowers the error on them, too. Else it is
rounded by least squares.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from sa3_convert.quantise.compensated import InputMoments, round_error_compensated
from sa3_convert.quantise.grid import Floats, Grid, one_thread, round_least_squares

GridOf = Callable[[str], Grid | None]
"""The grid of a linear by its name; None keeps it as it is."""
_NOTHING: Final = 1e-30


Call = tuple[Tensor, tuple[Any, ...]]
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
    """Round the linears of consecutive blocks in place; both sequences of samples advance with them.

    Args:
        blocks: by name, in order; each maps (state, *arguments) to the next state.
        fit: samples to fit on.
        check: samples to check with.
        grid_of: the grid of each linear, by full name.

    """
    samples = [*fit, *check]
    for name, block in blocks.items():
        groups = _groups(block, samples[0].original)
        originals, states = _run(block, [sample.original for sample in samples], [group[0] for group in groups])
        finished: dict[str, _Finished] = {}
        for group in groups:
            moved = _inputs_of(block, [sample.rounded for sample in samples], group[0])
            inputs = _Inputs(originals.pop(group[0]), moved, len(fit))
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
    """A block has run as far as it had to."""


def _groups(block: nn.Module, call: Call) -> list[list[str]]:
    """Return the paths of a block's linears in the order in which they run, those with the same input together."""
    seen: dict[int, tuple[Tensor, list[str]]] = {}

    def note(path: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.setdefault(id(arguments[0]), (arguments[0], []))[1].append(path)

    linears = [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
    with _Watching(block, linears, note):
        block(call[0], *call[1])
    return [paths for _, paths in seen.values()]


def _run(
    block: nn.Module, calls: Sequence[Call], watched: Sequence[str]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Return what reached the watched linears, [positions, in] per call, and the states behind the block."""
    caught: dict[str, list[Tensor]] = {path: [] for path in watched}
    with _Watching(block, watched, lambda path, _, arguments: caught[path].append(arguments[0].flatten(0, -2))):
        states = [block(state, *arguments) for state, arguments in calls]
    return caught, states


def _inputs_of(block: nn.Module, calls: Sequence[Call], path: str) -> list[Tensor]:
    """Return what reached one linear, [positions, in] per call; the block runs no further."""
    caught: list[Tensor] = []

    def catch(_: str, __: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0].flatten(0, -2))
        raise _ReachedError

    with _Watching(block, [path], catch):
        for state, arguments in calls:
            with contextlib.suppress(_ReachedError):
                block(state, *arguments)
    return caught


class _Watching:
    """Calls back before the linears at some paths of a block run, while it is entered."""

    def __init__(
        self, block: nn.Module, paths: Sequence[str], back: Callable[[str, nn.Module, tuple[Tensor, ...]], None]
    ) -> None:
        self._handles = [block.get_submodule(path).register_forward_pre_hook(partial(back, path)) for path in paths]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
