"""Weights that stand on the grid are left alone by the converter's rounding, and the chosen grid is never worse."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3_convert.arrays import Floats
from sa3_convert.rounding.grid import Grid, round_least_squares
from tests.rounding.converter import round_as_converter

GRIDS = st.builds(
    Grid,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    block_size=st.sampled_from([None, 16, 32, 24, 64]),
)


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def error(weight: Floats, rounded: Floats) -> float:
    return float(np.square(weight.astype(np.float64) - rounded).sum())


@settings(deadline=None, max_examples=60)
@given(grid=GRIDS, seed=st.integers(0, 1000), scale=st.floats(1e-6, 1e4))
def test_what_was_planned_comes_through_the_converters_rounding(grid: Grid, seed: int, scale: float) -> None:
    weight = gaussian((8, 64), seed) * np.float32(scale)
    planned = round_least_squares(weight, grid)
    np.testing.assert_allclose(round_as_converter(planned, grid), planned, rtol=1e-5, atol=1e-5 * scale, strict=True)


@settings(deadline=None, max_examples=60)
@given(grid=GRIDS, seed=st.integers(0, 1000), scale=st.floats(0.02, 100))
def test_what_was_planned_with_half_scales_comes_through_their_truncation(grid: Grid, seed: int, scale: float) -> None:
    weight = gaussian((8, 64), seed) * np.float32(scale)
    half = replace(grid, half_scales=True)
    planned = round_least_squares(weight, half)
    np.testing.assert_allclose(round_as_converter(planned, half), planned, rtol=1e-5, atol=1e-5 * scale, strict=True)


@settings(deadline=None, max_examples=60)
@given(grid=GRIDS, seed=st.integers(0, 1000), exponent=st.integers(-40, 4))
def test_half_scales_are_planned_alike_whatever_power_of_two_the_weights_are_times(
    grid: Grid, seed: int, exponent: int
) -> None:
    weight, half = gaussian((8, 64), seed), replace(grid, half_scales=True)
    planned = round_least_squares(np.ldexp(weight, exponent), half)
    np.testing.assert_array_equal(planned, np.ldexp(round_least_squares(weight, half), exponent))


@pytest.mark.parametrize(("bits", "block"), [(8, None), (8, 16), (4, 32)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_half_scales_cost_a_fifth_of_a_decibel_at_most_and_least_squares_stays_ahead(
    bits: int, block: int | None, symmetric: bool
) -> None:
    weight = gaussian((96, 256)) * np.float32(0.02)
    full = Grid(bits, symmetric, block)
    half = replace(full, half_scales=True)
    least = error(weight, round_least_squares(weight, half))
    assert least < error(weight, round_least_squares(weight, full)) * 10**0.02
    assert least < error(weight, round_as_converter(weight, half))


@settings(deadline=None, max_examples=60)
@given(grid=GRIDS, seed=st.integers(0, 1000))
def test_least_squares_is_never_worse_than_the_extremes(grid: Grid, seed: int) -> None:
    weight = gaussian((8, 64), seed)
    assert error(weight, round_least_squares(weight, grid)) <= error(weight, round_as_converter(weight, grid)) * 1.0001


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_number_of_levels_is_what_the_bits_allow(symmetric: bool) -> None:
    grid = Grid(bits=3, symmetric=symmetric, block_size=None)
    for row in round_least_squares(gaussian((4, 512)), grid):
        assert len(np.unique(row)) == (7 if symmetric else 8)


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_constant_channels_stay_exact(value: float) -> None:
    weight = np.full((2, 32), value, dtype=np.float32)
    for symmetric in (False, True):
        grid = Grid(bits=4, symmetric=symmetric, block_size=None)
        np.testing.assert_allclose(round_least_squares(weight, grid), weight, rtol=1e-6, strict=True)


@pytest.mark.parametrize(
    ("block", "shape", "length"),
    [
        (None, (4, 64), 64),
        (32, (4, 64), 32),
        (24, (4, 96), 96),
        (8, (4, 64), 64),
        (64, (4, 96), 96),
        (32, (4, 64, 3), 96),
        (None, (4, 64, 3), 192),
    ],
)
def test_a_block_size_that_the_converter_ignores_is_a_whole_channel(
    block: int | None, shape: tuple[int, ...], length: int
) -> None:
    assert Grid(bits=4, symmetric=False, block_size=block).group_length(shape) == length


def gain_db(weight: Floats, grid: Grid) -> float:
    before, after = round_as_converter(weight, grid), round_least_squares(weight, grid)
    return float(10 * np.log10(error(weight, before) / error(weight, after)))


def test_heavy_tails_gain_more_from_least_squares_than_gaussian_weights() -> None:
    heavy = np.random.default_rng(0).standard_t(4, (16, 768)).astype(np.float32)
    grid = Grid(bits=3, symmetric=False, block_size=None)
    assert gain_db(heavy, grid) > gain_db(gaussian((16, 768)), grid) + 1
