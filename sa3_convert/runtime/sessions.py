"""Sessions around sessions: held to a checked file and a layout, and two parts that run as one."""

from collections.abc import Sequence
from typing import Any, Protocol

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


class Part(Protocol):
    """A session that knows the names of its inputs."""

    @property
    def inputs(self) -> Sequence[str] | Any:
        """Names of the inputs."""
        ...

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class SplitSession:
    """Runs `step` with what `prepare` made of the same unchanging inputs; see `passes.split`."""

    def __init__(self, prepare: Part, step: Part) -> None:
        self._prepare = prepare
        self._step = step
        self._kept: list[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]] = []

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; ValueError if a feed is missing, unknown, or not what a part takes."""
        unchanging = set(self._prepare.inputs)
        if missing := sorted(unchanging - feeds.keys()):
            raise ValueError(f"the model takes {', '.join(sorted(unchanging))}; {missing[0]} is missing")
        available = {**feeds, **self._prepared({name: feeds[name] for name in unchanging})}
        wanted = set(self._step.inputs)
        if unknown := sorted(feeds.keys() - wanted - unchanging):
            raise ValueError(f"the model takes no {unknown[0]}")
        return self._step.run({name: array for name, array in available.items() if name in wanted})

    def close(self) -> None:
        """Free both parts and what is kept."""
        self._kept.clear()
        self._prepare.close()
        self._step.close()

    def _prepared(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        for known, made in self._kept:
            if all(np.array_equal(known[name], array) for name, array in feeds.items()):
                return made
        made = self._prepare.run(feeds)
        # Copies: a caller may change its arrays in place.
        self._kept = [*self._kept, ({name: array.copy() for name, array in feeds.items()}, made)][-_KEPT:]
        return made
