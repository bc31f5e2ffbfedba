"""Models that are loaded when they are needed, and kept as long as they shall be."""

import contextlib
from collections.abc import Iterator
from typing import Literal

from sa3_convert.arrays import Session, free
from sa3_convert.components import Component
from sa3_convert.runtime.engines import Engine

KeepLoaded = bool | Literal["last"]
"""Whether loaded models are kept: none, all, or the one that was used last."""


class Models:
    """Loads models when they are needed, and frees them after their stage unless they are kept."""

    def __init__(self, engine: Engine, *, keep_loaded: KeepLoaded = False) -> None:
        self.engine = engine
        self._keep_loaded = keep_loaded
        self._kept: dict[Component, Session] = {}

    @contextlib.contextmanager
    def use(self, component: Component) -> Iterator[Session]:
        """Yield a loaded model."""
        session = self._kept.get(component)
        if session is None:
            if self._keep_loaded == "last":
                self.close()
            session = self.engine.load(component)
            if self._keep_loaded:
                self._kept[component] = session
        try:
            yield session
        finally:
            if not self._keep_loaded:
                free(session)

    def close(self) -> None:
        """Free what was kept."""
        while self._kept:
            free(self._kept.popitem()[1])
