"""One pass over reference and target, and what it finds.

For each tensor that both have: how much error its own operators make, and which one is blamed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.check.metrics import MAX_DB, compare
from sa3_convert.errors import ModelFileError
from sa3_convert.lab.bisect.graphs import ReferenceGraph, TargetGraph
from sa3_convert.mnn.compatibility import Backend
from sa3_convert.mnn.session import Level, MnnSession

_FLOAT_LIMITS: Mapping[str, float] = {"fp32": 90.0, "fp16": 60.0, "bf16": 42.0}
"""Least ratio that an operator of float arithmetic has on the same inputs.

float32 operators measure 110 dB and more, one with float16 weights or constants 66 dB and more (half a unit in the last
place of 11 bits); the rest is room for cancellation.
"""
_AMPLIFICATION_DB = 20.0
"""No sound operator of these networks lifts relative error by more, unless it was handed a phase or a difference."""
_HARMFUL_DB = 40.0


def limit_db(stored: str) -> float:
    """Return the least ratio expected of an operator whose weights are stored as `stored`.

    Integers: 6.02 dB a bit less 12: two bits for the range that an asymmetric grid spends beyond the bulk of Gaussian
    weights (8 bits measure 42 dB, 6 bits 30, 4 bits 18, so 6 dB of room).
    """
    if stored in _FLOAT_LIMITS:
        return _FLOAT_LIMITS[stored]
    return 6.02 * int(stored.lstrip("uint")) - 12


@dataclass(frozen=True, slots=True)
class OperatorError:
    """One comparable tensor and the operators that make it from the comparable tensors before."""

    name: str
    """ONNX name of the tensor, which is that of its operator."""
    onnx_operators: tuple[str, ...]
    """More than one: they were fused, or their own results have no name in the target."""
    mnn_operator: str
    stored: str
    """Coarsest type among the weights and constants that take part."""
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    """Comparable tensors and graph inputs that it is made from."""
    error_in_db: float
    """Signal-to-noise ratio of its worst input, target against reference; 300 if all are exact."""
    error_out_db: float
    """Of the tensor, target against reference."""
    own_error_db: float
    """Of the tensor, target against what the reference makes of the target's inputs."""
    index: int
    """Position in the ONNX graph."""

    @property
    def is_faulty(self) -> bool:
        """Whether it makes more error than its storage explains."""
        return self.own_error_db < limit_db(self.stored)

    @property
    def amplifies(self) -> bool:
        """Whether it is right by itself and yet turns a small error into a harmful one."""
        harm = min(_HARMFUL_DB, self.error_in_db - _AMPLIFICATION_DB)
        return self.error_out_db < harm and self.own_error_db > self.error_out_db + 6


@dataclass(frozen=True)
class BisectResult:
    """All comparable tensors in the graph's order."""

    operators: tuple[OperatorError, ...]
    incomparable: tuple[str, ...]
    """ONNX names that do not exist in the target, or hold something else there."""

    @cached_property
    def suspect(self) -> OperatorError | None:
        """The operator to blame, or None.

        The first that makes more error than its storage explains; if there is none, the one whose error the first
        amplifying operator blows up.
        """
        for operator in self.operators:
            if operator.is_faulty:
                return operator
        amplifier = self.amplifier
        return None if amplifier is None else self._origin(amplifier)

    @cached_property
    def amplifier(self) -> OperatorError | None:
        """The first operator that turns a small error into a harmful one, if no operator is faulty by itself."""
        if any(operator.is_faulty for operator in self.operators):
            return None
        return next((operator for operator in self.operators if operator.amplifies), None)

    @property
    def worst(self) -> OperatorError:
        """The operator that makes the most error of its own."""
        return min(self.operators, key=lambda operator: operator.own_error_db)

    def _origin(self, operator: OperatorError) -> OperatorError:
        """Walk up along the worst input until an operator's own error explains its output's."""
        by_name = {o.name: o for o in self.operators}
        current = operator
        while current.own_error_db > current.error_out_db + 3:
            inputs = [by_name[name] for name in current.inputs if name in by_name]
            if not inputs:
                break
            current = min(inputs, key=lambda o: o.error_out_db)
        return current

    def verdict(self) -> str:
        """Return what was found, in one sentence."""
        suspect = self.suspect
        if suspect is None:
            worst = self.worst
            return (
                f"No operator makes more error than its storage explains; the most, {worst.own_error_db:.1f} dB, comes "
                f"from {worst.name} ({worst.mnn_operator}, {worst.stored})."
            )
        what = f"{suspect.name} ({'+'.join(suspect.onnx_operators)} in ONNX, {suspect.mnn_operator} in MNN)"
        if self.amplifier is not None:
            return (
                f"{what} brings in an error of {suspect.own_error_db:.1f} dB ({suspect.stored}), which "
                f"{self.amplifier.name} turns into {self.amplifier.error_out_db:.1f} dB."
            )
        return (
            f"{what} is the first operator whose error its inputs do not explain: on the same inputs it differs by "
            f"{suspect.own_error_db:.1f} dB, {suspect.stored} allows {limit_db(suspect.stored):.1f} dB."
        )

    def around(self, operator: OperatorError, reach: int = 4) -> tuple[OperatorError, ...]:
        """Return an operator with its neighbours in the graph's order."""
        at = self.operators.index(operator)
        return self.operators[max(0, at - reach) : at + reach + 1]

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data: verdict, suspect, every operator, and what was not comparable."""
        return {
            "verdict": self.verdict(),
            "suspect": None if self.suspect is None else self.suspect.name,
            "amplifier": None if self.amplifier is None else self.amplifier.name,
            "operators": [{**asdict(o), "limit_db": limit_db(o.stored)} for o in self.operators],
            "incomparable": list(self.incomparable),
        }


_MASKED_BELOW = -5e3

Values = dict[str, NDArray[Any]]


class TargetRuns:
    """Runs of the target that keep chosen tensors."""

    def __init__(
        self,
        path: Path,
        feeds: Arrays,
        threads: int | None,
        backend: Backend,
        *,
        precision: Level = "high",
        memory: Level = "normal",
    ) -> None:
        self.path, self._feeds, self._threads, self._backend = path, feeds, threads, backend
        self._precision, self._memory = precision, memory

    def outputs(self, names: Sequence[str]) -> Values:
        """Return tensors by name; fails if one cannot be had."""
        with MnnSession(
            self.path,
            inputs=list(self._feeds),
            outputs=names,
            threads=self._threads,
            precision=self._precision,
            memory=self._memory,
            backend=self._backend,
        ) as session:
            return session.run(self._feeds)

    def available(self, names: Sequence[str]) -> Values:
        """Return those of the tensors that MNN hands out; some that the file names exist only inside an operator."""
        try:
            return self.outputs(names)
        except ModelFileError:
            if len(names) == 1:
                return {}
            half = len(names) // 2
            return self.available(names[:half]) | self.available(names[half:])


class Walk:
    """One pass over the graph, group by group, with `comparable` tensors taken to mean the same on both sides."""

    def __init__(
        self, graph: ReferenceGraph, stored: TargetGraph, feeds: Arrays, runs: TargetRuns, comparable: Sequence[str]
    ) -> None:
        self._graph, self._stored, self._feeds, self._runs = graph, stored, feeds, runs
        self._comparable = dict.fromkeys(comparable)
        self._segments = {name: graph.segment(name, self._comparable) for name in comparable}
        self._last_use = {s: name for name, (_, sources) in self._segments.items() for s in sources}
        self._error_out: dict[str, float | None] = {}
        self._reference: Values = {}
        self._target: Values = {}
        self.errors: list[OperatorError] = []
        """One entry per tensor that could be judged."""

    def all(self, memory_limit: int) -> set[str]:
        """Judge every tensor; return those that cannot be compared after all, with which the pass has to be redone."""
        for group in self._groups(memory_limit):
            lost = self._judge(group)
            if lost:
                return lost
        return set()

    def _groups(self, memory_limit: int) -> list[list[str]]:
        groups: list[list[str]] = [[]]
        size = 0
        for name in self._comparable:
            size += self._graph.tensors[name].bytes
            if size > memory_limit and groups[-1]:
                groups.append([])
                size = self._graph.tensors[name].bytes
            groups[-1].append(name)
        return groups

    def _judge(self, group: Sequence[str]) -> set[str]:
        reference = self._graph.run(group, self._reference, self._feeds)
        target, lost = matched(reference, self._runs.available(group))
        if lost:
            return lost
        known = self._target | target
        sources = {source for name in group for source in self._segments[name][1]}
        explained = self._graph.run(group, {name: known[name] for name in sources}, self._feeds)
        for name in group:
            self._error_out[name] = signal_to_noise(reference[name], target[name])
            own = signal_to_noise(explained[name], target[name])
            if own is not None:
                self.errors.append(self._described(name, own, reference[name].shape))
        self._keep_what_is_used_later(group, reference, target)
        return set()

    def _described(self, name: str, own: float, shape: tuple[int, ...]) -> OperatorError:
        operators, sources = self._segments[name]
        incoming = [ratio for source in sources if (ratio := self._error_out[source]) is not None]
        tensor = self._graph.tensors[name]
        outgoing = self._error_out[name]
        return OperatorError(
            name=name,
            onnx_operators=tuple(self._graph.nodes[index].op_type for index in operators),
            mnn_operator=self._stored.operator(name),
            stored=self._stored.stored(name, self._comparable),
            shape=shape,
            inputs=sources + self._graph.inputs_of(operators),
            error_in_db=min(incoming, default=MAX_DB),
            error_out_db=-MAX_DB if outgoing is None else outgoing,
            own_error_db=own,
            index=tensor.index,
        )

    def _keep_what_is_used_later(self, group: Sequence[str], reference: Values, target: Values) -> None:
        position = {name: i for i, name in enumerate(self._comparable)}
        reached = position[group[-1]]
        needed = {s for s, user in self._last_use.items() if position[user] > reached}
        self._reference = {n: v for n, v in (self._reference | reference).items() if n in needed}
        self._target = {n: v for n, v in (self._target | target).items() if n in needed}


def matched(reference: Mapping[str, NDArray[Any]], target: Mapping[str, NDArray[Any]]) -> tuple[Values, set[str]]:
    """Give the target's arrays the reference's shapes, which MNN pads with ones; name those that are another thing."""
    matched: Values = {}
    lost: set[str] = set()
    for name, expected in reference.items():
        actual = target.get(name)
        if actual is None or actual.dtype != expected.dtype or _essential(actual) != _essential(expected):
            lost.add(name)
        else:
            matched[name] = actual.reshape(expected.shape)
    return matched, lost


def _essential(array: NDArray[Any]) -> list[int]:
    return [size for size in array.shape if size != 1]


def signal_to_noise(reference: NDArray[Any], target: NDArray[Any]) -> float | None:
    """Return the ratio in dB over the positions that the reference does not mask.

    Masked logits, -∞ or about -10⁴, would drown all others. A target that is not finite where the reference counts has
    `-MAX_DB`; None means that there is no position to judge by.
    """
    counts = np.isfinite(reference) & (reference > _MASKED_BELOW)
    if not np.isfinite(target[counts]).all():
        return -MAX_DB
    if not counts.any():
        return None
    if not counts.all():
        reference, target = reference[counts], target[counts]
    return compare(reference, target).signal_to_noise_db
