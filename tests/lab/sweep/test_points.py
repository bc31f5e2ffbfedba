"""Sizes as people write them, and which points are worth keeping."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3_convert.bundle.manifest import Fidelity
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.common import Common
from sa3_convert.lab.planner.measuring import measure
from sa3_convert.lab.planner.planner import bytes_beside
from sa3_convert.lab.sweep.page import bits_figure, page
from sa3_convert.lab.sweep.points import label_of, of_sizes, parse_sizes
from sa3_convert.lab.sweep.result import Measured, Sweep, frontier
from sa3_convert.lab.sweep.sweep import run_sweep
from sa3_convert.recipe import Recipe, load_recipe, own_recipes

ENDLESS, TINY = f"1:{'9' * 400}:1", f"1:2:0.{'0' * 320}1"
"""More than a float has, and steps that are next to nothing."""


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("200:450:25", [200, 225, 250, 275, 300, 325, 350, 375, 400, 425, 450]),
        ("0.6:1.2:0.2", [0.6, 0.8, 1.0, 1.2]),
        ("200:449:25", [200, 225, 250, 275, 300, 325, 350, 375, 400, 425]),
        ("300:300:1", [300]),
        ("200,300.5", [200, 300.5]),
        ("240", [240]),
    ],
)
def test_sizes(text: str, sizes: list[float]) -> None:
    assert parse_sizes(text) == pytest.approx(sizes)


@pytest.mark.parametrize(
    ("size", "name"),
    [(200.0, "200"), (0.1 + 0.2, "0.3"), (1e6, "1000000"), (123456.75, "123456.75"), (1e-5, "1e-05")],
)
def test_sizes_are_called_as_recipes_may_be(size: float, name: str) -> None:
    assert label_of(size) == name
    recipe = load_recipe(own_recipes()["int8"]).model_dump(exclude={"name"})
    assert Recipe.model_validate({"name": f"dit-{name}", **recipe}).name == f"dit-{name}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "0",
        "-5",
        "200:100:25",
        "200:450:0",
        "1:2:1e-9",
        "0.001:900:0.001",
        "nan",
        "inf",
        "1e9",
        "1:2",
        ",",
        ENDLESS,
        TINY,
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="FROM:TO:STEP"):
        parse_sizes(text)


@given(st.text(alphabet="0123456789.:,eE-+ infa", max_size=20))
def test_whatever_is_written_is_sizes_or_refused(text: str) -> None:
    try:
        sizes = parse_sizes(text)
    except UsageError:
        return
    assert 0 < len(sizes) <= 1000
    assert all(0 < size < 1e6 for size in sizes)


def point(name: str, size: int | None, ratio: float = 0.0, component: Component = Component.DIT) -> Measured:
    if size is None:
        return Measured(name=name, component=component, problem="no memory", exit_code=3)
    fidelity = Fidelity(signal_to_noise_db=ratio, cosine=1.0, max_abs_error=0.0)
    return Measured(name=name, component=component, bytes=size, fidelity=fidelity, bits={"a": 8, "b": 4})


def test_the_frontier_is_what_no_other_point_of_the_component_beats() -> None:
    points = [
        point("small", 10, 20),
        point("worse", 11, 19),
        point("equal", 12, 20),
        point("large", 20, 30),
        point("same-size", 20, 29),
        point("missing", None),
        point("other", 5, 40, Component.DECODER),
    ]
    assert frontier(points) == {"small", "large", "other"}


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=12))
def test_every_point_off_the_frontier_is_beaten_by_one_on_it(given_points: list[tuple[int, int]]) -> None:
    points = {str(number): point(str(number), *values) for number, values in enumerate(given_points)}
    best = frontier(list(points.values()))

    def beats(one: Measured, other: Measured) -> bool:
        assert one.fidelity is not None
        assert other.fidelity is not None
        assert one.bytes is not None
        assert other.bytes is not None
        return one.bytes <= other.bytes and one.fidelity.signal_to_noise_db >= other.fidelity.signal_to_noise_db

    for name in points.keys() - best:
        assert any(beats(points[kept], points[name]) for kept in best)
    for one, other in itertools.permutations(best, 2):
        assert not beats(points[one], points[other])


def test_the_page_says_what_is_missing_and_what_is_mixed_and_escapes_what_comes_from_outside() -> None:
    points = (point("a", 3 << 20, 31.5), point("<b>", None), point("c", 5 << 20, 40))
    text = page(Sweep(checkpoint="<script>", variant="small-music", points=points, mixed=True))
    assert "1 of 3 points are missing" in text
    assert "several kinds of processor" in text
    assert "missing: no memory" in text
    assert "31.5" in text
    assert "<script>" not in text
    assert "<b>" not in text


@pytest.mark.filterwarnings("error")
def test_a_map_of_few_layers_has_room_for_its_words() -> None:
    drawn = bits_figure([point("number_conditioner-within-2.11382", 1, 20)], "number_conditioner")
    assert "within-2.11382" in drawn


@pytest.mark.parametrize("component", Component)
def test_what_is_planned_comes_near_what_was_predicted(toy: Path, tmp_path: Path, component: Component) -> None:
    common = Common(toy, tmp_path, threads=1)
    known = measure(common, component, "fp16", lambda *_: None)
    base = load_recipe(own_recipes()["int8"])
    size = sum(min(one.size for one in layer.candidates if one.bits == 6) for layer in known.layers.values())
    size += bytes_beside(common.open(), component, base.for_component(component))
    (point,) = of_sizes(common.open(), component, base, known, [size / 2**20])
    assert point.predicted_db is not None
    (found,) = run_sweep(common, [point]).points
    assert not found.problem
    assert found.fidelity is not None
    assert found.bytes is not None
    # What a graph is counted for is most of a toy.
    assert 0.9 * size - 6144 < found.bytes <= size
    # The worst of a few inputs, beside the mean of others.
    assert found.fidelity.signal_to_noise_db == pytest.approx(point.predicted_db, abs=6)
