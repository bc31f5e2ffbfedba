"""The JSONL file of a batch: a generation per line.

Each line holds the settings of one generation as `GenerateRequest.from_json` reads them, paths relative to the batch
file, and optionally `output`, the name of its file.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa3_convert.bundle.overlap import folded
from sa3_convert.errors import InputError, Sa3Error, SettingError, UsageError
from sa3_convert.runtime.audio import check_output_path
from sa3_convert.runtime.request import GenerateRequest, located
from sa3_convert.runtime.setting_values import RANDOM
from sa3_convert.system.untrusted import check_name, parse_json, read_text

_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One generation of a batch."""

    line: int
    """In the batch file, from 1."""
    request: GenerateRequest
    output: str
    """File name within the batch's folder."""
    called: Mapping[str, str] = field(default_factory=dict)
    """What settings are called where they come from, if not by their own names."""
    any_seed: bool = False
    """Whether the seed was drawn, so that what another one made is as good."""


def read_batch(
    path: Path, defaults: Mapping[str, Any] | None = None, called: Mapping[str, str] | None = None
) -> list[BatchItem]:
    """Read a JSONL file of generations, and check every line of it.

    Args:
        path: the file.
        defaults: stand for what a line does not set.
        called: what errors call a default; a line's own settings have their names.

    Raises:
        InputError: the file cannot be read, is empty, or a line is no JSON object.
        UsageError: a line's settings cannot be; it is named.

    """
    try:
        # Other characters that break lines may stand in a prompt.
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    given = (defaults or {}, called or {})
    items = [_read_line(path, number, text, *given) for number, text in enumerate(lines, 1) if text.strip()]
    if not items:
        raise InputError(f"{path} holds no generation. Write one JSON object with a prompt per line.")
    seen: dict[str, int] = {}
    for item in items:
        # Some file systems take two spellings of a name for one.
        first = seen.setdefault(folded(item.output), item.line)
        if first != item.line:
            raise UsageError(f"{path}: lines {first} and {item.line} both write {item.output!r}.")
    return items


def _read_line(path: Path, number: int, text: str, defaults: Mapping[str, Any], called: Mapping[str, str]) -> BatchItem:
    where = f"{path}, line {number}"
    try:
        values = parse_json(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} is no JSON object.")
    output = values.pop("output", f"{number:04d}.wav")
    called = {name: called[name] for name in defaults.keys() & called.keys() - values.keys()}
    with in_line(where, called):
        if not isinstance(output, str) or Path(output).name != output or output.startswith("."):
            raise UsageError(f"output is {output!r}, expected a plain file name.")
        if len(os.fsencode(output)) > _LONGEST_NAME:
            raise UsageError(f"output is a name of more than {_LONGEST_NAME} bytes.")
        check_name(Path(output))
        check_output_path(Path(output), "pcm16")
        settings = {**defaults, **located(values, path.parent)}
        return BatchItem(number, GenerateRequest.from_json(settings), output, called, settings.get("seed") == RANDOM)


@contextlib.contextmanager
def in_line(where: str, called: Mapping[str, str]) -> Iterator[None]:
    """Name the line in an error."""
    try:
        yield
    except SettingError as error:
        raise UsageError(f"{where}: {error.told(called)}") from None
    except Sa3Error as error:
        raise type(error)(f"{where}: {error}") from None
