from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.runtime.sessions import SplitSession

Floats = NDArray[np.float32]


class Part:
    """Takes named inputs, gives a function of them, and counts."""

    def __init__(self, inputs: tuple[str, ...], output: str, function: Callable[..., Floats]) -> None:
        self.inputs, self.output, self.function = inputs, output, function
        self.runs = 0
        self.closed = False

    def run(self, feeds: Arrays) -> dict[str, Floats]:
        assert feeds.keys() == set(self.inputs)
        self.runs += 1
        return {self.output: self.function(**feeds)}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def parts() -> tuple[Part, Part]:
    prepare = Part(("c", "d"), "s", lambda c, d: 2 * c + d)
    return prepare, Part(("x", "d", "s"), "y", lambda x, d, s: x + 10 * d + 100 * s)


def feeds(x: float, c: float, d: float = 0) -> dict[str, Floats]:
    return {name: np.full(3, value, np.float32) for name, value in (("x", x), ("c", c), ("d", d))}


def test_what_stays_the_same_is_computed_once(parts: tuple[Part, Part]) -> None:
    session = SplitSession(*parts)
    for x in range(5):
        np.testing.assert_array_equal(session.run(feeds(x, 1, 2))["y"], np.full(3, x + 20 + 400))
    assert [part.runs for part in parts] == [1, 5]


def test_guidance_with_two_conditions_in_turn_prepares_each_once(parts: tuple[Part, Part]) -> None:
    session = SplitSession(*parts)
    for x in range(4):
        for c in (1, 3):
            np.testing.assert_array_equal(session.run(feeds(x, c))["y"], np.full(3, x + 200 * c))
    assert parts[0].runs == 2


def test_no_more_than_two_conditions_are_kept(parts: tuple[Part, Part]) -> None:
    session = SplitSession(*parts)
    for c in (1, 2, 3, 1):
        assert session.run(feeds(0, c))["y"][0] == 200 * c
    assert parts[0].runs == 4


def test_an_array_that_was_changed_in_place_is_prepared_anew(parts: tuple[Part, Part]) -> None:
    session = SplitSession(*parts)
    given = feeds(0, 1)
    session.run(given)
    given["c"][1] = 5
    np.testing.assert_array_equal(session.run(given)["y"], [200, 1000, 200])


def test_another_length_is_prepared_anew(parts: tuple[Part, Part]) -> None:
    session = SplitSession(*parts)
    session.run(feeds(0, 1))
    assert session.run({name: array[:2] for name, array in feeds(0, 1).items()})["y"].shape == (2,)


@pytest.mark.parametrize(("change", "named"), [({"c": None}, "c is missing"), ({"z": np.zeros(3)}, "takes no z")])
def test_other_feeds_are_refused(parts: tuple[Part, Part], change: dict[str, Floats | None], named: str) -> None:
    given = {name: array for name, array in {**feeds(0, 1), **change}.items() if array is not None}
    with pytest.raises(ValueError, match=named):
        SplitSession(*parts).run(given)


def test_closing_frees_both(parts: tuple[Part, Part]) -> None:
    SplitSession(*parts).close()
    assert all(part.closed for part in parts)
