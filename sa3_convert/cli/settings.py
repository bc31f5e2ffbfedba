"""What `run` is to generate: settings from its options, from a file, or from both, told in the words of either."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_convert.errors import InputError, SettingError, UsageError
from sa3_convert.system.untrusted import parse_json, read_json

if TYPE_CHECKING:
    from sa3_convert.runtime.request import GenerateRequest

_SETTINGS = (
    "prompt", "seconds", "bpm", "bars", "beats_per_bar", "steps", "seed",
    "sampler", "cfg_scale", "apg_scale", "cfg_interval", "cfg_rescale",
    "cfg_norm_threshold", "negative_prompt", "dist_shift", "duration_padding", "init_audio", "init_noise_level",
    "inpaint_audio", "inpaint", "peak", "loudness", "adapters",
)  # fmt: skip
"""Options that are settings of a request, by its names."""

OPTIONS: Mapping[str, str] = {name: f"--{name.replace('_', '-')}" for name in _SETTINGS} | {"adapters": "--adapter"}


def given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the command line tells, as JSON values."""
    told = {name: value for name in _SETTINGS if (value := parameters[name]) not in (None, [], ())}
    return {
        name: _AS_JSON[name](value) if name in _AS_JSON else str(value) if isinstance(value, Path) else value
        for name, value in told.items()
    }


def variations_of(request: "GenerateRequest", count: int) -> list["GenerateRequest"]:
    """Return so many requests with seeds that follow one another."""
    return [dataclasses.replace(request, seed=request.seed + n) for n in range(count)]


def _seed(text: str) -> int | str:
    if text == "random":
        return text
    if not text.removeprefix("-").isdecimal() or len(text) > _MOST_DIGITS:
        raise UsageError(f"--seed is {text[:_MOST_DIGITS]!r}; give a whole number, or random.")
    return int(text)


def _pair(text: str, what: str) -> list[float]:
    start, _, end = text.partition(":")
    try:
        return [float(start), float(end)]
    except ValueError:
        raise UsageError(f"{text!r} is no {what}.") from None


def _shift(text: str) -> dict[str, Any]:
    """Return a distribution shift as `model_config.json` spells it."""
    kind, _, rest = text.partition(":")
    try:
        numbers = parse_json("{" + re.sub(r"(\w+)=", r'"\1":', rest) + "}")
    except ValueError:
        raise UsageError(
            f"--dist-shift {text!r} cannot be read; write TYPE or TYPE:NAME=NUMBER,…, such as "
            "flux:alpha_min=2,alpha_max=4."
        ) from None
    return {"type": kind, **numbers}


_MOST_DIGITS = 30
_REGION = "region for --inpaint; write START:END in seconds, such as 2.5:4"
_INTERVAL = "--cfg-interval; write LOW:HIGH as noise levels, such as 0.3:0.9"
_AS_JSON: Mapping[str, Callable[[Any], Any]] = {
    "seed": _seed,
    "inpaint": lambda texts: [_pair(text, _REGION) for text in texts],
    "cfg_interval": lambda text: _pair(text, _INTERVAL),
    "dist_shift": _shift,
}
"""Settings that options spell in another way than JSON."""


@contextlib.contextmanager
def in_words_of(called: Mapping[str, str]) -> Iterator[None]:
    """Name settings in an error as whoever gave them calls them."""
    try:
        yield
    except SettingError as error:
        raise UsageError(error.told(called)) from None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be generated."""

    settings: Mapping[str, Any]
    """JSON values of a request."""
    called: Mapping[str, str] = field(default_factory=lambda: OPTIONS)
    """How errors name them."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What a file of settings tells beside them: variant and models that they were made with."""


def wanted(options: Mapping[str, Any], from_file: Path | None) -> Wanted:
    """Return what options and a file describe; an option overrides the file."""
    from sa3_convert.runtime.request import located

    if from_file is None:
        if "prompt" not in options:
            raise UsageError('Give --prompt "what to generate", --from FILE, or --batch FILE.jsonl.')
        return Wanted(options)
    origin = _read(from_file)
    kept = located(origin.pop("request"), from_file.parent)
    kept = {name: value for name, value in kept.items() if name not in options}
    named = {name: f"{name} of {from_file}" for name, value in kept.items() if value is not None}
    return Wanted({**kept, **options}, {**OPTIONS, **named}, origin)


def _read(path: Path) -> dict[str, Any]:
    """Return what a file of `--json` holds, or audio that `run` has made."""
    unread = f"{path} cannot be read as the settings that `run --json` writes"
    from sa3_convert.runtime.audio import ENDINGS, read_metadata

    found = read_metadata(path) if path.suffix.lower() in ENDINGS else _json(path, unread)
    if not isinstance(found, dict) or not isinstance(found.get("request"), dict):
        several = isinstance(found, dict) and "variations" in found
        why = "it has several; name one of their files" if several else "it has no request"
        raise InputError(f"{unread}: {why}.")
    for name, kind in (("variant", str), ("models", dict), ("engine", dict), ("adapters", list)):
        if not isinstance(found.get(name, kind()), kind):
            raise InputError(f"{unread}: {name} is of another kind.")
    return found


def _json(path: Path, unread: str) -> Any:
    try:
        return read_json(path)
    except OSError as error:
        raise InputError(f"{unread}: {error.strerror or error}.") from None
    except ValueError as error:
        raise InputError(f"{unread}: {error}.") from None
