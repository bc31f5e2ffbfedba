"""Figures now beside figures then: which moved further than they may, why that far, and what else has changed."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from sa3_convert.check.results import CLAIM_CEILING_DB
from sa3_convert.components import Component
from sa3_convert.lab.drift.baseline import BundleBaseline, Figure, Origin

Statistic = Literal["mean", "5 %", "worst"]

ARITHMETIC_DB: Final = 90.0
_SIGMAS: Final = 3.0
_QUANTILE_ERROR: Final = 2.11
"""√(p·(1 − p)) / φ(z_p) at p = 0.05."""
_BOUNDS: Final[dict[Statistic, tuple[float, float]]] = {"mean": (0.1, 0.5), "5 %": (0.2, 1.0), "worst": (0.3, 2.0)}
_SIZE_SHARE: Final = 0.01
_SIZE_BYTES: Final = 4096
_SPEED_SHARE: Final = 0.5
_SPEED_MOST: Final = 2.0
_NORMAL_MAD: Final = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation, which one outlier does not move."""

FORMULA: Final = (
    "A ratio may fall by k·s + 10·log10(1 + 10^((F − 90 dB)/10)): s its standard deviation between seeds, k = 3/√n for "
    "a mean of n (0.1 to 0.5 dB), 6.3/√n for the 5 % point (0.2 to 1 dB), 3 for the worst (0.3 to 2 dB); ratios count "
    f"up to {CLAIM_CEILING_DB:g} dB. A size may grow by 1 % and 4 KiB, speed by half, storage may not change."
)


def counted(ratios: Iterable[float]) -> list[float]:
    """Return ratios as they count: at most the ceiling."""
    return [min(ratio, CLAIM_CEILING_DB) for ratio in ratios]


def scatter(groups: Iterable[Sequence[float]]) -> float:
    """Return the pooled standard deviation within groups, in dB; 0 when no group has two members."""
    members = [np.asarray(group, np.float64) for group in groups if len(group) > 1]
    freedom = sum(group.size - 1 for group in members)
    if not freedom:
        return 0.0
    return math.sqrt(sum(float(((group - group.mean()) ** 2).sum()) for group in members) / freedom)


def may_fall_by(statistic: Statistic, value: float, count: int, deviation: float) -> float:
    """Return how much a figure of so many ratios may fall, all in dB; `deviation` is that between seeds."""
    factor = {"mean": 1 / math.sqrt(count), "5 %": _QUANTILE_ERROR / math.sqrt(count), "worst": 1.0}[statistic]
    least, most = _BOUNDS[statistic]
    arithmetic = 10 * math.log10(1 + 10 ** ((value - ARITHMETIC_DB) / 10))
    return min(max(_SIGMAS * factor * deviation, least), most) + arithmetic


def size_may_grow_by(size: int) -> float:
    """Return how many bytes a file may grow by."""
    return _SIZE_SHARE * size + _SIZE_BYTES


def speed_may_grow_by(ratio: float, ratios: Sequence[float]) -> float:
    """Return how much a ratio of times may grow, from the repeats that it is the median of."""
    deviation = _NORMAL_MAD * statistics.median(abs(r - ratio) for r in ratios)
    return min(max(_SPEED_SHARE * ratio, _SIGMAS * deviation), _SPEED_MOST * ratio)


BY_ENGINE = "sampled inputs, "
"""Figures of models for another engine than MNN; its name follows."""
Status = Literal["held", "better", "moved", "gone", "new", "not judged"]

FAILING: frozenset[Status] = frozenset({"moved", "gone", "new"})


@dataclass(frozen=True, slots=True)
class Row:
    """One figure on both sides."""

    before: Figure | None
    """None: the baseline has no such figure."""
    now: Figure | None
    """None: it was not measured."""
    status: Status

    @property
    def figure(self) -> Figure:
        """The baseline's figure, or the new one."""
        figure = self.before or self.now
        assert figure is not None
        return figure

    @property
    def allowed(self) -> float | str | None:
        """The furthest value that still passes; None for what is not judged by one."""
        return None if self.before is None else limit(self.before)

    @property
    def failed(self) -> bool:
        """Whether it is drift."""
        return self.status in FAILING

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "component": self.figure.component.value,
            "kind": self.figure.kind,
            "name": self.figure.name,
            "status": self.status,
            "rule": self.figure.rule,
            "tolerance": self.figure.tolerance,
            "before": None if self.before is None else self.before.value,
            "now": None if self.now is None else self.now.value,
            "allowed": self.allowed,
            "case": None if self.now is None else self.now.case,
            "step": None if self.now is None else self.now.step,
        }


@dataclass(frozen=True, slots=True)
class Drift:
    """A bundle held to its baseline."""

    baseline: BundleBaseline
    rows: tuple[Row, ...]
    changes: tuple[str, ...]
    """What figures depend on and is not what it was, a line each."""

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are drift."""
        return tuple(row for row in self.rows if row.failed)

    @property
    def passed(self) -> bool:
        """Whether every figure is where it may be."""
        return not self.failures

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        variant, recipe, size = self.baseline.key
        return {
            "variant": variant,
            "recipe": recipe,
            "size": size,
            "passed": self.passed,
            "baseline": self.baseline.history[-1].model_dump(mode="json"),
            "changes": list(self.changes),
            "rows": [row.to_data() for row in self.rows],
        }


def compare_figures(baseline: BundleBaseline, figures: Sequence[Figure], origin: Origin) -> Drift:
    """Return every figure of either side with its verdict, in the baseline's order, new ones last."""
    before, now = ({figure.key: figure for figure in side} for side in (baseline.figures, figures))
    same_machine = origin.processor == baseline.origin.processor
    pairs = [(before.get(key), now.get(key)) for key in before | now]
    rows = tuple(Row(*pair, _status(*pair, same_machine)) for pair in pairs)
    return Drift(baseline, rows, tuple(changes(baseline.origin, origin)))


def _status(before: Figure | None, now: Figure | None, same_machine: bool) -> Status:
    if any(f and f.kind == "speed" for f in (before, now)) and not (before and now and same_machine):
        return "not judged"
    # Whether a conversion makes models for another engine depends on its machine.
    if any(f and f.name.startswith(BY_ENGINE) for f in (before, now)) and not (before and now):
        return "not judged"
    if before is None:
        return "new"
    return "gone" if now is None else _moved(before, now)


def _moved(before: Figure, now: Figure) -> Status:
    if isinstance(before.value, str) or isinstance(now.value, str):
        return "held" if before.value == now.value else "moved"
    gain = now.value - before.value if before.rule == "may not fall" else before.value - now.value
    if gain < -before.tolerance:
        return "moved"
    return "better" if gain > before.tolerance else "held"


def limit(figure: Figure) -> float | str:
    """Return the furthest value that still passes."""
    if isinstance(figure.value, str):
        return figure.value
    return figure.value - figure.tolerance if figure.rule == "may not fall" else figure.value + figure.tolerance


def changes(before: Origin, now: Origin) -> Iterator[str]:
    """Yield what differs between two origins, each line with what it is about in front."""
    yield from _differences(before.converted_with, now.converted_with, "tool: converted with ")
    yield from _differences(before.measured_with, now.measured_with, "tool: measured with ")
    yield from _differences(_flat(before.recipe), _flat(now.recipe), "recipe: ")
    yield from (f"checkpoint: other weights of {name}" for name in _changed(before.checkpoint, now.checkpoint))
    yield from (f"our code: {room} changed" for room in _changed(before.code, now.code))
    yield from (f"file: {path} has other bytes" for path in _changed(before.files, now.files))
    if before.processor != now.processor:
        yield f"machine: {before.processor} → {now.processor}"


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in _changed(before, now):
        yield f"{prefix}{key} {before.get(key, 'absent')} → {now.get(key, 'absent')}"


def _flat(data: Any, path: str = "") -> dict[str, Any]:
    """Return nested mappings and lists as one mapping from dotted paths to values."""
    if isinstance(data, Mapping) and data:
        items = data.items()
    elif isinstance(data, list) and data:
        items = {str(index): value for index, value in enumerate(data)}.items()
    else:
        return {path: data}
    return {
        key: value for name, part in items for key, value in _flat(part, f"{path}.{name}" if path else name).items()
    }


def worst_cases(rows: Sequence[Row]) -> list[Figure]:
    """Return, for each component of which a ratio fell, the figure whose case shows it best.

    A generation rather than a sampled input, the model's own error rather than what a free run makes of it, and of
    those the lowest ratio.
    """
    found: dict[Component, Figure] = {}
    fallen = [row.now for row in rows if row.now is not None and row.now.case is not None]
    for figure in sorted(fallen, key=_rank):
        found.setdefault(figure.component, figure)
    return list(found.values())


def _rank(figure: Figure) -> tuple[bool, bool, float]:
    sampled, free = figure.name.startswith("sampled"), figure.name.startswith("free-running")
    return sampled, free, figure.value if isinstance(figure.value, float) else 0.0
