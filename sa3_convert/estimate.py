"""How long a conversion will take and how much memory it needs, told before it starts.

The rates are those of true-size conversions of small-music and medium on two x86 cores (MNN 3.6.1, torch 2.13), each
per byte of the component's float32 reference. They tell minutes from hours and what fits from what does not; another
machine, or a busy one, may take a multiple of the time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sa3_convert.recipe import ComponentRecipe
from sa3_convert.stages import Stage

_GIB: Final = 2**30
_PROC: Final = Path("/proc/meminfo")
_GROUP: Final = Path("/sys/fs/cgroup")
_LEAST_MEMORY: Final = 0.6
"""GiB of a process with torch and ONNX Runtime in it and a toy to convert."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What a stage takes, as `start` + `per_gib` · GiB of reference."""

    seconds_per_gib: float
    memory_per_gib: float
    """GiB, not counting pages of mapped files, which the system takes back when it needs them."""
    start_seconds: float = 1.0
    start_memory: float = 1.0
    """Of true-size components; toys take less."""

    def memory(self, gib: float) -> float:
        """Return GiB for a reference of `gib`."""
        return min(self.start_memory, _LEAST_MEMORY + 4 * gib) + self.memory_per_gib * gib


_RATES: Final[Mapping[Stage, Rate]] = {
    "export": Rate(23, 0.4, start_seconds=10),
    "round": Rate(170, 1.2, start_memory=3.4),
    "mnn": Rate(18, 0.3),
    "verify": Rate(10, 1.1, start_memory=1.5),
    "ort-int8": Rate(20, 1.5),
    "split": Rate(40, 1.1, start_seconds=4, start_memory=1.5),
}
_PLANNED_SECONDS_PER_GIB: Final = 27
"""What rounding by least squares adds to the mnn stage."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one component, or of all."""

    seconds: float
    memory_bytes: int
    """At the most, in one process."""


def estimate(stages: Iterable[Stage], reference_bytes: int, recipe: ComponentRecipe) -> Estimate:
    """Return what some stages of a component will take.

    Args:
        stages: those that have to run.
        reference_bytes: of its float32 reference.
        recipe: how it will be stored.

    """
    size = reference_bytes / _GIB
    rates = {stage: _RATES[stage] for stage in stages}
    seconds = sum(rate.start_seconds + rate.seconds_per_gib * size for rate in rates.values())
    if "mnn" in rates and recipe.weights is not None and recipe.weights.rounding == "least_squares":
        seconds += _PLANNED_SECONDS_PER_GIB * size
    memory = max((rate.memory(size) for rate in rates.values()), default=0.0)
    return Estimate(seconds, round(memory * _GIB))


def total(estimates: Iterable[Estimate]) -> Estimate:
    """Return what components take one after the other."""
    found = list(estimates)
    return Estimate(sum(one.seconds for one in found), max((one.memory_bytes for one in found), default=0))


def available_memory(meminfo: Path = _PROC, group: Path = _GROUP) -> int | None:
    """Return how much memory a process can still get, swap included, or None where the system does not tell.

    Args:
        meminfo: Linux's description of the machine's memory.
        group: folder of the control group, whose limit counts too.

    """
    found = _fields(meminfo)
    if "MemAvailable" not in found:
        return None
    free = found["MemAvailable"] + found.get("SwapFree", 0)
    limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return free
    return min(free, max(0, limit - used))


def _fields(meminfo: Path) -> dict[str, int]:
    """Return bytes by name."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = (line.replace(":", " ").split() for line in lines)
    return {words[0]: int(words[1]) * 1024 for words in pairs if len(words) > 1 and words[1].isdigit()}


def _number(file: Path) -> int | None:
    """Return a control group's number; None for `max` and where there is none."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None
