"""What the probes found, kept per MNN, backend and machine: read by other commands without MNN or ONNX."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import Field, TypeAdapter

from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.mnn.compatibility import mnn_version
from sa3_convert.system.machine import architecture, gpus, machine
from sa3_convert.system.sealed import fingerprint, read_sealed, write_sealed
from sa3_convert.system.untrusted import parse_json

SCHEMA = 2
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
    """The row of `passes.hazards` that it shows."""
    avoided: str = ""
    """What this tool does about that row."""
    needed_by: tuple[Component, ...] = ()
    """Components whose graphs are spelled like this."""
    ahead: bool = False
    """Whether a split DiT has it in the parts that run ahead, which do not compute with halves."""

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
    architecture: str = field(default_factory=architecture)

    def defects(self) -> dict[str, Outcome]:
        """Return the outcome of every probe that does not just work."""
        return {r.probe: r.worst.outcome for r in self.results if r.worst.outcome != "works"}

    def result(self, probe: str) -> ProbeResult | None:
        """Return one probe's result."""
        return next((r for r in self.results if r.probe == probe), None)

    def failing(self, component: Component, setting: str, *, split: bool = False) -> tuple[ProbeResult, ...]:
        """Return the probes of spellings that a component, or the last of its parts, needs and that are not right."""
        needed = (r for r in self.results if component in r.needed_by and not (split and r.ahead))
        return tuple(r for r in needed if r.at(setting).outcome in BAD)

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data, which `from_data` reads back."""
        return {"schema": SCHEMA} | asdict(self)

    @staticmethod
    def from_data(data: Any) -> "Diagnosis":
        """Read what `to_data` gave."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError("not a diagnosis of this schema")
        return _reader().validate_python(data)


@cache
def _reader() -> TypeAdapter[Diagnosis]:
    return TypeAdapter(Diagnosis)


def setting_name(precision: str, memory: str) -> str:
    """Return how answers call a setting of the runtime."""
    return f"precision {precision}, memory {memory}"


@cache
def this_machine() -> str:
    """Return a short name for what decides how MNN computes here: processor, instruction sets, GPUs."""
    found: dict[str, Any] = machine()
    parts = {name: found[name] for name in ("processor", "instructions")}
    return fingerprint(**parts, architecture=architecture(), gpus=[(gpu.name, gpu.driver) for gpu in gpus()])[:12]


def diagnosis_path(backend: str) -> Path:
    """Return where the diagnosis of the installed MNN on this machine stands."""
    folder = Path(platformdirs.user_cache_dir("sa3-convert")) / "doctor"
    return folder / f"mnn-{mnn_version()}-{backend}-{this_machine()}.json"


def save(diagnosis: Diagnosis) -> Path:
    """Keep a diagnosis of the installed MNN on this machine; return where."""
    path = diagnosis_path(diagnosis.backend)
    write_sealed(path, json.dumps(diagnosis.to_data(), indent=1, allow_nan=False).encode())
    return path


def saved(backend: str) -> Diagnosis | None:
    """Return what was found for the installed MNN on this machine, or None when it was not probed."""
    try:
        diagnosis = Diagnosis.from_data(parse_json(read_sealed(diagnosis_path(backend)).decode()))
    except (OSError, ValueError):
        return None
    wanted = (mnn_version(), backend, this_machine())
    return diagnosis if (diagnosis.mnn, diagnosis.backend, diagnosis.machine) == wanted else None


CONVERSION_SETTING = setting_name("high", "normal")
"""How a conversion runs what it made."""


def check_conversion(components: Collection[Component]) -> str | None:
    """Refuse to convert what needs a spelling that MNN is known to get wrong here; return a note if none is known."""
    diagnosis = saved("cpu")
    if diagnosis is None:
        return (
            f"MNN {mnn_version()} was not probed on this machine; `sa3-convert doctor` finds out, in seconds, "
            "what it gets wrong here."
        )
    for component in components:
        if failing := diagnosis.failing(component, CONVERSION_SETTING):
            raise ConversionError(
                f"{component.value}: the installed MNN {diagnosis.mnn} is wrong here on what it is made of: "
                f"{described(failing, CONVERSION_SETTING)}. Install the version in constraints.txt; if MNN was changed "
                "since, run `sa3-convert doctor` again."
            )
    return None


def described(results: Collection[ProbeResult], setting: str) -> str:
    """Return what failed, in a few words each."""
    words = []
    for result in results:
        answer = result.at(setting)
        ratio = "" if answer.db is None else f" ({answer.db:.0f} dB)"
        words.append(f"probe {result.probe} {answer.outcome}{ratio}")
    return ", ".join(words)
