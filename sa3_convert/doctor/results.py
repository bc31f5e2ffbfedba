"""What the probes found, as data that another process reads without MNN or ONNX."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from sa3_convert.components import Component

SCHEMA = 1
"""Changes with the shape of the saved file; a file of another schema counts as not there."""

Outcome = Literal["works", "wrong", "unsupported", "fails", "cpu"]
"""works: close enough to ONNX Runtime, or does what was asked. wrong: another result without an error. unsupported: the
converter writes no file. fails: it does not load or run, with an error or a crash. cpu: right, but part of it ran on
the CPU."""

BAD: tuple[Outcome, ...] = ("wrong", "unsupported", "fails")


@dataclass(frozen=True, slots=True)
class Answer:
    """One probe's answer at one setting of the runtime."""

    outcome: Outcome
    db: float | None = None
    """Signal-to-noise ratio of the worst output against ONNX Runtime; None where there are no numbers to compare."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What one probe found."""

    probe: str
    asks: str
    answers: Annotated[Mapping[str, Answer], Field(min_length=1)]
    """By setting ("precision high, memory normal"); a probe of the converter has one, named "converter"."""
    hazard: str | None = None
    """The row of `passes.hazard_kinds` that it shows."""
    avoided: str = ""
    """What this tool does about that row."""
    needed_by: tuple[Component, ...] = ()
    """Components whose graphs are spelled like this."""

    @property
    def worst(self) -> Answer:
        """The answer that counts when no setting is named."""
        order = {name: rank for rank, name in enumerate(("fails", "unsupported", "wrong", "cpu", "works"))}
        return min(self.answers.values(), key=lambda a: (order[a.outcome], 0 if a.db is None else a.db))

    def at(self, setting: str) -> Answer:
        """Return the answer at a setting, or the worst one when the probe does not know it."""
        return self.answers.get(setting, self.worst)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All probes on one backend of one build of MNN on one machine."""

    mnn: str
    backend: str
    machine: str
    results: tuple[ProbeResult, ...]
    seconds: float = 0.0
    surroundings: Mapping[str, Any] = field(default_factory=dict)

    def defects(self) -> dict[str, Outcome]:
        """Return the outcome of every probe that does not just work."""
        return {r.probe: r.worst.outcome for r in self.results if r.worst.outcome != "works"}

    def result(self, probe: str) -> ProbeResult | None:
        """Return one probe's result."""
        return next((r for r in self.results if r.probe == probe), None)

    def failing(self, component: Component, setting: str) -> tuple[ProbeResult, ...]:
        """Return the probes of spellings that a component needs and that are not right at a setting."""
        return tuple(r for r in self.results if component in r.needed_by and r.at(setting).outcome in BAD)

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data, which `from_data` reads back."""
        return {"schema": SCHEMA} | asdict(self)

    @staticmethod
    def from_data(data: Any) -> "Diagnosis":
        """Read what `to_data` gave.

        Raises:
            ValueError: it is not that, or of another schema.

        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError("not a diagnosis of this schema")
        return _reader().validate_python(data)


@cache
def _reader() -> TypeAdapter[Diagnosis]:
    return TypeAdapter(Diagnosis)


def setting_name(precision: str, memory: str) -> str:
    """Return how answers call a setting of the runtime."""
    return f"precision {precision}, memory {memory}"
