"""Tolerances: by hand, and never so wide that a loss of 1 dB passes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3_convert.check.results import CLAIM_CEILING_DB
from sa3_convert.lab.drift.compare import FORMULA, counted, may_fall_by, scatter, size_may_grow_by, speed_may_grow_by


def test_ratios_count_up_to_the_ceiling() -> None:
    assert counted([31.0, 79.9, 80.1, 300.0]) == [31.0, 79.9, 80.0, 80.0]


def test_scatter_is_pooled_within_groups_and_blind_to_what_differs_between_them() -> None:
    assert scatter([[30.0, 32.0], [40.0, 42.0]]) == pytest.approx(math.sqrt(2))
    assert scatter([[30.0, 32.0, 31.0], [99.0]]) == pytest.approx(1.0)


@pytest.mark.parametrize("groups", [[], [[30.0]], [[30.0], [40.0]]])
def test_scatter_of_single_values_is_none(groups: list[list[float]]) -> None:
    assert scatter(groups) == 0.0


def test_a_mean_may_fall_by_three_standard_errors() -> None:
    assert may_fall_by("mean", 30.0, 100, 1.0) == pytest.approx(0.3, abs=1e-4)


def test_a_five_percent_point_may_fall_further_and_the_worst_furthest() -> None:
    assert may_fall_by("5 %", 30.0, 100, 1.0) == pytest.approx(0.633, abs=1e-3)
    assert may_fall_by("worst", 30.0, 100, 0.5) == pytest.approx(1.5, abs=1e-4)


def test_every_tolerance_has_a_least_and_a_most() -> None:
    assert may_fall_by("mean", 30.0, 1000, 0.0) == pytest.approx(0.1, abs=1e-4)
    assert may_fall_by("mean", 30.0, 2, 50.0) == pytest.approx(0.5, abs=1e-4)
    assert may_fall_by("worst", 30.0, 2, 50.0) == pytest.approx(2.0, abs=1e-4)


def test_arithmetic_noise_adds_nothing_to_quantised_ratios_and_grows_towards_the_ceiling() -> None:
    noise = {ratio: may_fall_by("mean", ratio, 1000, 0.0) - 0.1 for ratio in (30.0, 45.0, 66.0, CLAIM_CEILING_DB)}
    assert noise[30.0] < noise[45.0] < 0.001
    assert noise[66.0] == pytest.approx(0.017, abs=1e-3)
    assert noise[CLAIM_CEILING_DB] == pytest.approx(0.414, abs=1e-3)


@given(st.floats(-300, CLAIM_CEILING_DB), st.integers(1, 10_000), st.floats(0, 300))
def test_no_mean_may_fall_by_one_decibel(value: float, count: int, deviation: float) -> None:
    assert 0.1 <= may_fall_by("mean", value, count, deviation) < 1.0


def test_a_size_may_grow_by_names_and_structure() -> None:
    assert size_may_grow_by(10_000_000) == 104_096


def test_a_speed_ratio_may_grow_by_half_or_by_its_scatter_but_never_more_than_threefold() -> None:
    assert speed_may_grow_by(1.0, [1.0, 1.0, 1.01]) == 0.5
    assert speed_may_grow_by(1.0, [0.8, 1.0, 1.2]) == pytest.approx(3 * 1.4826 * 0.2)
    assert speed_may_grow_by(1.0, [0.1, 1.0, 9.0]) == 2.0


def test_the_formula_is_stated_in_one_sentence_per_rule() -> None:
    for said in ("90 dB", "80 dB", "0.1 to 0.5", "0.2 to 1", "0.3 to 2", "1 %", "4 KiB", "half"):
        assert said in FORMULA
