"""A model in two parts that runs as one: what stays the same from call to call is computed once."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sa3_convert.session import Arrays

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
    """Runs `step` with what `prepare` made of the same unchanging inputs; see `passes.split`.

    Args:
        prepare: takes unchanging inputs alone.
        step: takes the rest, and what `prepare` gives.

    """

    def __init__(self, prepare: Part, step: Part) -> None:
        self._prepare = prepare
        self._step = step
        self._kept: list[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]] = []

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; see `sa3_convert.session.Session.run`.

        Raises:
            ValueError: a feed is missing, unknown, or not what a part takes.

        """
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
