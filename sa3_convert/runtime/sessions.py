"""Sessions around sessions: held to a checked file and a layout, and parts that run as one."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays, Session, free
from sa3_convert.components import Contract, Length, Port
from sa3_convert.errors import ModelFileError
from sa3_convert.system.checked_files import CheckedFile, named


class HeldSession:
    """Runs a session whose files must be what was checked, and whose arrays must be what the contract says.

    A model that was loaded by name is held to its files from the moment it is loaded.
    """

    def __init__(self, session: Session, files: Sequence[CheckedFile], contract: Contract) -> None:
        self._session = session
        self._files = files
        self._contract = contract
        self._name = named(files[0].path)
        for file in files:
            file.require_unchanged()

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; ModelFileError if the model does not take the feeds, or gives something else than it should."""
        length = _length(self._contract.inputs, feeds)
        try:
            results = self._session.run(feeds)
        except ValueError as error:
            raise self._other_model(str(error)) from None
        for file in self._files:
            if file.companion is not None:
                file.companion.require_unchanged()
        for port in self._contract.outputs:
            array = results.get(port.name)
            expected = port.concrete(length)
            if array is None or array.shape != expected or str(array.dtype) != port.dtype:
                found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
                raise self._other_model(f"{port.name} is {found}, expected {port.dtype} {list(expected)}")
        return results

    def close(self) -> None:
        """Free the model."""
        free(self._session)

    def _other_model(self, why: str) -> ModelFileError:
        return ModelFileError(
            f"{self._name} is not the model that the bundle's layout describes: {why.rstrip('.')}. Convert again."
        )


def _length(ports: Sequence[Port], feeds: Arrays) -> int:
    """Return T of the feeds, 0 where there is none, and hold them to what they should be."""
    if feeds.keys() != {port.name for port in ports}:
        raise ValueError(f"the model takes {', '.join(port.name for port in ports)}, not {', '.join(feeds)}")
    lengths = {
        size // dimension.factor
        for port in ports
        for size, dimension in zip(feeds[port.name].shape, port.shape, strict=False)
        if isinstance(dimension, Length)
    }
    length = max(lengths, default=0)
    for port in ports:
        array = feeds[port.name]
        if array.shape != port.concrete(length) or str(array.dtype) != port.dtype:
            raise ValueError(f"{port.name} is {array.dtype} {list(array.shape)}, expected {port.dtype} {port.shape}")
    return length


_KEPT = 2
"""Guidance alternates between two conditions."""


class Part(Session, Protocol):
    """A session that knows the names of its inputs."""

    @property
    def inputs(self) -> Iterable[str]:
        """Names of the inputs."""
        ...


class SplitSession:
    """Runs parts in turn, each on the feeds and on what those before it made; see `passes.split`.

    What all but the last made of the same inputs is kept.
    """

    def __init__(self, *parts: Part) -> None:
        *self._early, self._last = parts
        self._kept: list[list[tuple[Arrays, Arrays]]] = [[] for _ in self._early]

    @classmethod
    def opened(cls, kind: Callable[..., Part], files: Iterable[Path], **options: Any) -> Self:
        """Open files as sessions of a kind."""
        return cls(*(kind(file, **options) for file in files))

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; ValueError if a feed is missing, unknown, or not what a part takes."""
        known = {name for part in (*self._early, self._last) for name in part.inputs}
        if unknown := sorted(feeds.keys() - known):
            raise ValueError(f"the model takes no {unknown[0]}")
        available = dict(feeds)
        for part, kept in zip(self._early, self._kept, strict=True):
            available |= _made(part, _taken(part, available), kept)
        return self._last.run(_taken(self._last, available))

    def close(self) -> None:
        """Free the parts and what is kept."""
        for kept in self._kept:
            kept.clear()
        for part in (*self._early, self._last):
            free(part)


def _taken(part: Part, available: Arrays) -> Arrays:
    if missing := sorted(set(part.inputs) - available.keys()):
        raise ValueError(f"the model takes {', '.join(sorted(part.inputs))}; {missing[0]} is missing")
    return {name: available[name] for name in part.inputs}


def _made(part: Part, feeds: Arrays, kept: list[tuple[Arrays, Arrays]]) -> Arrays:
    for known, made in kept:
        if all(known[name] is array or np.array_equal(known[name], array) for name, array in feeds.items()):
            return made
    made = part.run(feeds)
    # Copies, unless nobody can: a caller may change its arrays in place.
    copies = {name: array.copy() if array.flags.writeable else array for name, array in feeds.items()}
    kept[:] = [*kept, (copies, made)][-_KEPT:]
    return made
