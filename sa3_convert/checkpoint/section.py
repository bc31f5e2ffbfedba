"""JSON configuration read so that nothing is silently left out: each key is taken once, the rest is refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa3_convert.errors import CheckpointError
from sa3_convert.system import untrusted

_LARGEST = 2**31 - 1
_SHOWN = 200


def shown(value: Any) -> str:
    """Return a value of a file for a message: as Python spells it, cut where it gets long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class Section:
    """One JSON object of a config: each key is taken once, and what is left over is refused by name."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where} is {type(values).__name__}, expected an object.")
        self._values = dict(values)
        self._where = where

    def section(self, key: str) -> "Section":
        """Take an object that must be there."""
        if key not in self._values:
            raise CheckpointError(f"{self._where} has no {key!r}.")
        return Section(self._values.pop(key), f"{self._where}.{key}")

    def optional_section(self, key: str) -> "Section | None":
        """Take an object that may be absent or null."""
        if self._values.get(key) is None:
            self.ignore(key)
            return None
        return self.section(key)

    def has(self, key: str) -> bool:
        """Tell whether a key is there and not taken."""
        return key in self._values

    def raw(self, key: str, default: Any = ...) -> Any:
        """Take a value of any type; without a default it must be there."""
        if key in self._values:
            return self._values.pop(key)
        if default is ...:
            raise CheckpointError(f"{self._where} has no {key!r}.")
        return default

    def integer(self, key: str, default: Any = ..., *, minimum: int = 1, maximum: int = _LARGEST) -> int:
        """Take an integer within bounds."""
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise CheckpointError(
                f"{self._where}.{key} is {shown(value)}, expected an integer in {minimum}..{maximum}."
            )
        return value

    def number(self, key: str, default: Any = ..., *, positive: bool = False) -> float:
        """Take a finite number."""
        value = self.raw(key, default)
        sound = isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
        if not sound:
            raise CheckpointError(f"{self._where}.{key} is {shown(value)}, expected a number.")
        if positive and value <= 0:
            raise CheckpointError(f"{self._where}.{key} is {shown(value)}, expected a positive number.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Take a truth value."""
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self._where}.{key} is {shown(value)}, expected true or false.")
        return value

    def only(self, key: str, supported: Any, default: Any = ...) -> None:
        """Take a setting that has one supported value (or a tuple of them)."""
        value = self.raw(key, default)
        allowed = supported if isinstance(supported, tuple) else (supported,)
        if not any(type(value) is type(a) and value == a for a in allowed):
            wanted = " or ".join(repr(a) for a in allowed)
            raise CheckpointError(f"{self._where}.{key} is {shown(value)}; only {wanted} is supported.")

    def one_of_list(self, key: str, default: Any = ..., *, minimum: int = 1, maximum: int = _LARGEST) -> int:
        """Take a per-stage list that must have exactly one stage, as every published SAME has."""
        value = self.raw(key, default)
        stage = value[0] if isinstance(value, list) and len(value) == 1 else None
        if isinstance(stage, bool) or not isinstance(stage, int) or not minimum <= stage <= maximum:
            raise CheckpointError(
                f"{self._where}.{key} is {shown(value)}; "
                f"only a list of one integer in {minimum}..{maximum} is supported."
            )
        return stage

    def ignore(self, *keys: str) -> None:
        """Drop settings that matter for training or loading only."""
        for key in keys:
            self._values.pop(key, None)

    def finish(self) -> None:
        """Refuse what nobody took."""
        if self._values:
            names = ", ".join(f"{self._where}.{key}" for key in sorted(self._values))
            raise CheckpointError(f"Unsupported setting {names}: this tool does not know what it means.")


def read_json(path: Path, limit: int = untrusted.SMALL) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable, too large or not JSON as `untrusted.parse_json` takes it.

    """
    try:
        return untrusted.read_json(path, limit)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
