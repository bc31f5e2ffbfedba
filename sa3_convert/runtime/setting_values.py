"""Values of settings: what JSON says of them, read and held to their kinds."""

import math
import re
import reprlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import TypeAdapter, ValidationError

from sa3_convert.checkpoint.dimensions import FluxShift, FullShift, LogSnrShift, NoShift, Shift
from sa3_convert.checkpoint.json_file import faults
from sa3_convert.checkpoint.lora_file import LoraRequest
from sa3_convert.errors import SettingError, UsageError

RANDOM: Final = "random"
"""In place of a seed, in JSON."""
_INTERVAL = re.compile(r"(.+)@(\d*\.?\d+)-(\d*\.?\d+)", re.ASCII | re.DOTALL)
SHIFTS = NoShift | LogSnrShift | FluxShift | FullShift
_SHIFT: TypeAdapter[Shift] = TypeAdapter(Shift)
_NUMBERS = (
    "seconds", "bpm", "cfg_scale", "apg_scale", "cfg_rescale", "cfg_norm_threshold", "duration_padding",
    "init_noise_level", "loudness",
)  # fmt: skip
_WHOLE = ("seed", "steps", "bars", "beats_per_bar")
AUDIO = ("init_audio", "inpaint_audio")
_LARGEST = 1 << 64


@dataclass(frozen=True, slots=True)
class AdapterRequest:
    """An adapter as asked for: how strongly it is applied, and at which noise levels."""

    path: Path
    strength: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise UsageError(f"The strength of {self.path} must be a finite number, not {self.strength}.")
        if not 0 <= self.low <= self.high <= 1:
            raise UsageError(
                f"{self.low:g}-{self.high:g} is no interval of noise levels, which are 0 (audio) to 1 (noise)."
            )

    @classmethod
    def parse(cls, text: str) -> "AdapterRequest":
        """Parse FILE[:STRENGTH][@LOW-HIGH]; UsageError if it is something else."""
        interval = _INTERVAL.fullmatch(text)
        named = LoraRequest.parse(interval[1] if interval else text, "--adapter")
        bounds = (float(interval[2]), float(interval[3])) if interval else (0.0, 1.0)
        return cls(named.path, named.strength, *bounds)

    def __str__(self) -> str:
        strength, low, high = (np.format_float_positional(n, trim="-") for n in (self.strength, self.low, self.high))
        return f"{self.path}:{strength}@{low}-{high}"


def read_value(key: str, value: Any, *, optional: bool) -> Any:
    """Return a setting's value for its JSON value; of an optional one None is its own."""

    def unlike(expected: str) -> SettingError:
        return SettingError(f"{{{key}}} is {{0}}, {expected}.", shown(value))

    if value is None and optional:
        return None
    if key == "cfg_interval":
        if _is_pair(value):
            return float(value[0]), float(value[1])
        raise unlike("expected [low, high]")
    if key == "dist_shift":
        try:
            return _SHIFT.validate_python(value)
        except ValidationError as error:
            raise SettingError("{dist_shift}: {0}.", faults(error)) from None
    if key == "inpaint":
        if isinstance(value, list) and all(map(_is_pair, value)):
            return tuple((float(start), float(end)) for start, end in value)
        raise unlike("expected a list of [start, end] in seconds")
    if key == "adapters":
        if isinstance(value, list) and all(isinstance(text, str) and _is_name(text) for text in value):
            return tuple(map(AdapterRequest.parse, value))
        raise unlike("expected a list of texts, FILE[:STRENGTH][@LOW-HIGH]")
    if key in _NUMBERS:
        if not _is_number(value):
            raise unlike("expected a number")
        return float(value)
    if key in _WHOLE:
        if key == "seed" and value == RANDOM:
            return secrets.randbelow(1 << 32)
        if not isinstance(value, int) or not _is_number(value):
            raise unlike("expected a whole number")
        return value
    if not isinstance(value, str):
        raise unlike("expected text")
    if key not in AUDIO:
        return value
    if not _is_name(value):
        raise unlike("which no file is called")
    return Path(value)


def _is_name(value: str) -> bool:
    """Tell whether a file can be called so."""
    return bool(value) and "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and [_is_number(v) for v in value] == [True] * 2


def _is_number(value: Any) -> bool:
    """Tell whether a value is a number that a float can be."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _LARGEST
    return isinstance(value, float)


def shown(value: Any) -> str:
    """Return a value as messages show it."""
    # Python spells no integer of more than 4300 digits.
    return "a number beyond all bounds" if isinstance(value, int) and abs(value) >= _LARGEST else reprlib.repr(value)
