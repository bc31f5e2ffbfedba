"""One `.mnn` on two backends, or at two settings of one: which operator is the first to come out differently.

Both sides run the same file, so every tensor that MNN hands out is compared, whatever it was called in ONNX. Errors
travel: a tensor is charged to its operator only where it differs clearly more than what the operator was given.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.check.metrics import MAX_DB
from sa3_convert.errors import UsageError, VerificationError
from sa3_convert.lab.bisect.graphs import TargetGraph
from sa3_convert.lab.bisect.walk import TargetRuns, signal_to_noise
from sa3_convert.mnn.compatibility import BACKENDS, Backend, require_backend
from sa3_convert.mnn.file.contents import ModelStorage
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.mnn.session import Level
from sa3_convert.system.checked_files import named

ROUNDING_DB = 80.0
"""Float32 arithmetic in another order stays above (110 dB for one operator, less after many)."""
CHARGED_DB = 12.0
"""How much worse than its inputs an operator's output must be to be charged with it."""
_AT_ONCE = 512
"""Tensors that are kept in one run."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """How one side runs the file."""

    backend: Backend = "cpu"
    precision: Level = "high"
    memory: Level = "normal"
    threads: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Runtime":
        """Read BACKEND[,precision=LEVEL][,memory=LEVEL][,threads=N]."""
        backend, *settings = text.split(",")
        found: dict[str, Any] = {"backend": backend}
        levels = ("normal", "high", "low")
        for setting in settings:
            name, _, value = setting.partition("=")
            known = name == "threads" and value.isdigit() and int(value) > 0
            if not known and not (name in ("precision", "memory") and value in levels):
                break
            found[name] = int(value) if name == "threads" else value
        else:
            if backend in BACKENDS:
                return cls(**found)
        raise UsageError(
            f"{text!r} is no way to run a model; write BACKEND[,precision=LEVEL][,memory=LEVEL][,threads=N], such as "
            f"cpu,memory=low. Backends: {', '.join(BACKENDS)}; levels: {', '.join(levels)}."
        )

    def __str__(self) -> str:
        parts: list[str] = [self.backend]
        parts += [f"{name} {getattr(self, name)}" for name in ("precision", "memory")]
        return ", ".join(parts if self.threads is None else [*parts, f"{self.threads} threads"])


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor on both sides."""

    name: str
    operator: str
    """MNN's name for what makes it."""
    stored: str
    """Coarsest type of the weights that it is made with."""
    shape: tuple[int, ...]
    in_db: float
    """Ratio of the worst of the compared tensors that it is made from; 300 if they are equal."""
    out_db: float

    @property
    def is_charged(self) -> bool:
        """Whether it differs by more than rounding and clearly more than what it is made from."""
        return self.out_db < min(ROUNDING_DB, self.in_db - CHARGED_DB)


@dataclass(frozen=True)
class RuntimeComparison:
    """All compared tensors in the file's order."""

    target: Runtime
    reference: Runtime
    differences: tuple[Difference, ...]

    @cached_property
    def suspect(self) -> Difference | None:
        """The first operator that is charged."""
        return next((d for d in self.differences if d.is_charged), None)

    @property
    def worst(self) -> Difference:
        """The tensor that differs most."""
        return min(self.differences, key=lambda d: d.out_db)

    def verdict(self) -> str:
        """Return what was found, in a sentence."""
        what = f"{self.target} against {self.reference}"
        found, worst = self.suspect, self.worst
        if found is None:
            return f"{what}: no operator differs by more than rounding; at most {worst.out_db:.1f} dB, in {worst.name}."
        return (
            f"{what}: {found.name} ({found.operator}, {found.stored}) is the first that differs: "
            f"{found.out_db:.1f} dB, from inputs that agree to {found.in_db:.1f} dB."
        )

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "verdict": self.verdict(),
            "target": asdict(self.target),
            "reference": asdict(self.reference),
            "suspect": None if self.suspect is None else self.suspect.name,
            "operators": [asdict(d) | {"is_charged": d.is_charged} for d in self.differences],
        }


def bisect_against(path: Path, feeds: Arrays, target: Runtime, reference: Runtime) -> RuntimeComparison:
    """Compare every float tensor of a file between two ways to run it."""
    if target == reference:
        raise UsageError(f"Both sides are {target}: there is nothing to compare.")
    for runtime in (target, reference):
        require_backend(runtime.backend)
    storage = read_storage(path)
    sides = tuple(
        TargetRuns(path, feeds, r.threads, r.backend, precision=r.precision, memory=r.memory)
        for r in (target, reference)
    )
    # The outputs alone first: what does not load or run on a side fails here, with that side's own message.
    ends = [port.name for port in storage.outputs]
    for side in sides:
        side.outputs(ends)
    found = tuple(_differences(storage, *sides))
    if not found:
        raise VerificationError(f"MNN hands out no float tensor of {named(path)}: nothing can be compared.")
    return RuntimeComparison(target, reference, found)


def _differences(storage: ModelStorage, target: TargetRuns, reference: TargetRuns) -> Iterator[Difference]:
    """Yield what both sides hand out, in the file's order."""
    graph = TargetGraph(storage)
    operators = [op for op in storage.operators if not op.graph]
    made_from = {out: op.inputs for op in operators for out in op.outputs}
    # MNN does not hand out what has only a name of its own, such as SliceTf58; asking costs a load.
    own = {out for op in operators for out in op.outputs if re.fullmatch(rf"{op.type}\d+", out)}
    names = [out for out in made_from if out in graph.tensors and out not in own]
    ratios: dict[str, float] = {}
    for start in range(0, len(names), _AT_ONCE):
        group = names[start : start + _AT_ONCE]
        values, expected = target.available(group), reference.available(group)
        for name in group:
            ratio = _ratio(expected.get(name), values.get(name))
            if ratio is None:
                continue
            stored = graph.stored(name, ratios.keys())
            ratios[name] = ratio
            incoming = _incoming(name, made_from, ratios)
            yield Difference(name, graph.operator(name), stored, expected[name].shape, incoming, ratio)


def _ratio(reference: NDArray[Any] | None, target: NDArray[Any] | None) -> float | None:
    if reference is None or target is None or reference.dtype != np.float32 or target.shape != reference.shape:
        return None
    return signal_to_noise(reference, target) if reference.size else None


def _incoming(name: str, made_from: Mapping[str, Sequence[str]], ratios: Mapping[str, float]) -> float:
    """Return the worst ratio among the nearest compared tensors that a tensor is made from."""
    worst, waiting, seen = MAX_DB, list(made_from.get(name, ())), {name}
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in ratios:
            worst = min(worst, ratios[source])
        else:
            waiting += made_from.get(source, ())
    return worst
