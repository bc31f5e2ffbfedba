"""What the probes found, as data that another process reads without MNN or ONNX."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

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
    answers: Mapping[str, Answer]
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

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read what `to_data` gave.

        Raises:
            ValueError: it is not that, or of another schema.

        """
        try:
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']!r}")
            return cls(
                **{name: str(data[name]) for name in ("mnn", "backend", "machine")},
                results=tuple(_result(entry) for entry in data["results"]),
                seconds=float(data["seconds"]),
                surroundings=dict(data["surroundings"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a diagnosis: {error!r}") from None


def setting_name(precision: str, memory: str) -> str:
    """Return how answers call a setting of the runtime."""
    return f"precision {precision}, memory {memory}"


def _result(data: Any) -> ProbeResult:
    answers = {str(name): _answer(answer) for name, answer in data["answers"].items()}
    if not answers:
        raise ValueError("a probe without an answer")
    hazard = data["hazard"]
    return ProbeResult(
        probe=str(data["probe"]),
        asks=str(data["asks"]),
        answers=answers,
        hazard=None if hazard is None else str(hazard),
        avoided=str(data["avoided"]),
        needed_by=tuple(Component(name) for name in data["needed_by"]),
    )


def _answer(data: Any) -> Answer:
    if data["outcome"] not in get_args(Outcome):
        raise ValueError(f"outcome {data['outcome']!r}")
    db = data["db"]
    return Answer(data["outcome"], None if db is None else float(db), str(data["detail"]))
