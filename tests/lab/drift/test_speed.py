"""Speed ratios: what is measured, in which order, and what they may become."""

import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.lab.drift.drift import time_ratios


class FakeClock:
    """A processor clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []


class FakeSession:
    def __init__(self, clock: FakeClock, name: str, seconds: float) -> None:
        self.clock, self.name, self.seconds = clock, name, seconds

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        self.clock.now += self.seconds
        self.clock.order.append(self.name)
        return {"out": np.zeros(1, np.float32)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    made = FakeClock()
    monkeypatch.setattr(time, "process_time", lambda: made.now)
    return made


def test_the_ratio_is_the_targets_time_over_the_references(clock: FakeClock) -> None:
    ratios = time_ratios(FakeSession(clock, "reference", 0.2), FakeSession(clock, "target", 0.3), {}, repeats=3)
    assert ratios == pytest.approx([1.5] * 3)


def test_each_side_begins_in_turn(clock: FakeClock) -> None:
    time_ratios(FakeSession(clock, "r", 0.2), FakeSession(clock, "t", 0.3), {}, repeats=2)
    assert "".join(clock.order)[-4:] == "trrt"


def test_short_runs_are_repeated_until_the_clock_can_see_them(clock: FakeClock) -> None:
    time_ratios(FakeSession(clock, "r", 0.001), FakeSession(clock, "t", 0.001), {}, repeats=1)
    assert clock.order[-50:] == ["r"] * 50
