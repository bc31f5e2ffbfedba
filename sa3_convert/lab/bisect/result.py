"""What a bisection found, and which operator it blames."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

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
