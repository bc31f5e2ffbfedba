"""Which precision each layer gets: the least total error within a number of bytes, with proof of how near it is.

A multiple-choice knapsack. Each layer keeps the options on the lower convex hull of (bytes, error); upgrades are taken
in order of error removed per byte (greedy on the hull, which solves the relaxation in which a layer may be split
between two options). The relaxation's value is a lower bound on any choice, so the result carries its own proof: the
optimum lies between `bound` and `error`. Options off the hull are then tried once more on the bytes that are left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sa3_convert.errors import UsageError


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a layer."""

    bits: int | None
    """None is fp16."""
    block_size: int | None
    size: int
    """Bytes of codes, scales and offsets."""
    error: float
    """Predicted energy of the error that it causes at the component's output, as a share of the output's own energy."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """One option per layer, and what is known of the choice."""

    chosen: Mapping[str, Option]
    size: int
    error: float
    bound: float
    """No choice within the bytes has less error than this."""


_SLACK: Final = 1e-12


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> Allocation:
    """Choose one option per layer so that the total error is least within `budget` bytes."""
    hulls = {layer: _hull(choices) for layer, choices in options.items()}
    level = dict.fromkeys(hulls, 0)
    size = sum(hull[0].size for hull in hulls.values())
    if size > budget:
        raise UsageError(f"The smallest plan needs {size / 2**20:.1f} MiB; {budget / 2**20:.1f} MiB were asked for.")
    error = sum(hull[0].error for hull in hulls.values())
    bound = error
    upgrades = sorted(
        ((_slope(hull[i], hull[i + 1]), layer, i) for layer, hull in hulls.items() for i in range(len(hull) - 1)),
        key=lambda upgrade: (-upgrade[0], upgrade[1], upgrade[2]),
    )
    relaxed_left: float = budget - size
    for slope, layer, index in upgrades:
        hull = hulls[layer]
        extra = hull[index + 1].size - hull[index].size
        if relaxed_left > 0:
            bound -= slope * min(extra, relaxed_left)
            relaxed_left -= extra
        if level[layer] == index and size + extra <= budget:
            level[layer], size = index + 1, size + extra
            error -= hull[index].error - hull[index + 1].error
    chosen = {layer: hulls[layer][level[layer]] for layer in hulls}
    chosen = _fill(options, chosen, budget - size)
    return Allocation(
        chosen=chosen,
        size=sum(option.size for option in chosen.values()),
        error=sum(option.error for option in chosen.values()),
        bound=max(bound, 0.0),
    )


def smallest_for_error(options: Mapping[str, Sequence[Option]], target: float) -> Allocation:
    """Choose options so that the total error is at most `target`, in as few bytes as the bisection finds."""
    best = sum(min(option.error for option in choices) for choices in options.values())
    if best > target:
        raise UsageError("No plan is that close: even the finest options cause more error. Ask for less.")
    low = sum(min(option.size for option in choices) for choices in options.values())
    high = sum(max(option.size for option in choices) for choices in options.values())
    found = allocate(options, high)
    while low < high:
        middle = (low + high) // 2
        attempt = allocate(options, middle)
        if attempt.error <= target:
            found, high = attempt, middle
        else:
            low = middle + 1
    return found


def _slope(first: Option, second: Option) -> float:
    return (first.error - second.error) / (second.size - first.size)


def _hull(choices: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull, smallest first, error strictly falling."""
    hull: list[Option] = []
    for option in sorted(choices, key=lambda option: (option.size, option.error)):
        if hull and option.error >= hull[-1].error * (1 - _SLACK):
            continue
        if hull and option.size == hull[-1].size:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _fill(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int) -> dict[str, Option]:
    """Spend what is left on single changes, the one that removes most error first, until none fits."""
    while True:
        gains = (
            (chosen[layer].error - option.error, layer, option)
            for layer, choices in options.items()
            for option in choices
            if option.size - chosen[layer].size <= left and option.error < chosen[layer].error
        )
        best = max(gains, key=lambda gain: gain[0], default=None)
        if best is None:
            return chosen
        _, layer, option = best
        left -= option.size - chosen[layer].size
        chosen = chosen | {layer: option}
