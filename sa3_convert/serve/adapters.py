"""LoRAs that a server was given: clients know them by name, and no file of the machine comes from a client."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sa3_convert.bundle.reader import Bundle
from sa3_convert.errors import BundleError, LoraError, UsageError
from sa3_convert.runtime.adapters import Adapters, rank_of
from sa3_convert.runtime.engines import EngineName
from sa3_convert.runtime.setting_values import AdapterRequest, shown
from sa3_convert.serve.worker import Served, hidden

_BEHIND = (":", "@")
"""What follows a name: a strength, noise levels."""


def named(files: Sequence[Path]) -> dict[str, Path]:
    """Return files by the names that clients use, which are theirs without the ending; UsageError if two are alike."""
    found: dict[str, Path] = {}
    for file in files:
        if other := found.get(file.stem):
            raise UsageError(f"--adapter {other} and {file} would both be called {file.stem!r}; rename one.")
        found[file.stem] = file.absolute()
    return found


def fitting(bundle: Bundle, engine: EngineName, adapters: Mapping[str, Path]) -> tuple[dict[str, Path], list[str]]:
    """Return the adapters that a bundle's models take, and of the others why not.

    Raises:
        CheckpointError: a file is missing or damaged.

    """
    found: dict[str, Path] = {}
    problems: list[str] = []
    for name, path in adapters.items():
        try:
            Adapters.of_bundle(bundle, rank_of(bundle, engine)).open([AdapterRequest(path)])
        except (BundleError, LoraError) as error:
            problems.append(str(error))
        else:
            found[name] = path
    return found, problems


def require_taken(adapters: Mapping[str, Path], served: Collection[Served], problems: Sequence[str]) -> None:
    """Refuse adapters that none of the models that are served takes; the message says why."""
    for name, path in adapters.items():
        if not any(name in one.adapters for one in served):
            raise LoraError(f"No model that is served takes {path}. {' '.join(dict.fromkeys(problems))}")


def located(texts: Any, adapters: Mapping[str, Path]) -> Any:
    """Return what a client asks for, NAME[:STRENGTH][@LOW-HIGH] each, with files for names; UsageError of others."""
    if not isinstance(texts, list):  # which is refused where settings are read
        return texts
    return [_located(text, adapters) if isinstance(text, str) else text for text in texts]


def _located(text: str, adapters: Mapping[str, Path]) -> str:
    for name in sorted(adapters, key=len, reverse=True):
        rest = text.removeprefix(name)
        if text.startswith(name) and (not rest or rest.startswith(_BEHIND)):
            try:
                request = AdapterRequest.parse(f"{adapters[name]}{rest}")
            except UsageError as error:
                raise UsageError(hidden(str(error), adapters)) from None
            if request.path == adapters[name]:
                return str(request)
    there = f"There are: {', '.join(adapters)}." if adapters else "This model has none."
    raise UsageError(f"There is no adapter {shown(text)}. {there}")
