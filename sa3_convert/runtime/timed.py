"""An engine that keeps the time of everything its models do."""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from sa3_convert.components import Component
from sa3_convert.runtime.engines import Engine, EngineName
from sa3_convert.session import Arrays, Session


@dataclass(slots=True)
class Clock:
    """Seconds and runs since the last reset."""

    load: float = 0.0
    run: defaultdict[Component, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds within the engine's own calls."""
    runs: Counter[Component] = field(default_factory=Counter)

    def reset(self) -> None:
        """Start at zero."""
        self.load = 0.0
        self.run.clear()
        self.runs.clear()


class TimedEngine:
    """Loads another engine's models and times them.

    Args:
        engine: what really loads and runs.
        clock: what the times are added to.

    """

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    @property
    def name(self) -> EngineName:
        """The engine's name."""
        return self._engine.name

    @property
    def settings(self) -> Mapping[str, Any]:
        """The engine's settings."""
        return self._engine.settings

    def load(self, component: Component) -> Session:
        """Load a model; see `Engine.load`."""
        start = time.perf_counter()
        session = self._engine.load(component)
        self._clock.load += time.perf_counter() - start
        return _TimedSession(session, component, self._clock)


class _TimedSession:
    def __init__(self, session: Session, component: Component, clock: Clock) -> None:
        self._session = session
        self._component = component
        self._clock = clock

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        start = time.perf_counter()
        result = self._session.run(feeds)
        self._clock.run[self._component] += time.perf_counter() - start
        self._clock.runs[self._component] += 1
        return result

    def close(self) -> None:
        close = getattr(self._session, "close", None)
        if close is not None:
            close()
