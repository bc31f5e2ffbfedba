"""One linear, rounded with what is known of its inputs in both networks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3_convert.arrays import Floats
from sa3_convert.rounding.compensated import InputMoments, round_error_compensated
from sa3_convert.rounding.grid import Grid, round_least_squares
from tests.rounding.converter import round_as_converter

FOUR_BITS = Grid(bits=4, symmetric=False, block_size=None)


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def correlated_inputs(count: int, width: int, seed: int) -> Floats:
    directions = gaussian((8, width), seed=99)
    return gaussian((count, width), seed) + gaussian((count, 8), seed + 1) @ directions


def moments(original: Floats, rounded: Floats | None = None) -> InputMoments:
    return InputMoments.of(*(torch.from_numpy(x) for x in (original, original if rounded is None else rounded)))


def error(one: Floats, other: Floats) -> float:
    return float(np.square(one.astype(np.float64) - other).sum())


@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_lowers_the_output_error_on_unseen_correlated_inputs(block: int | None, symmetric: bool) -> None:
    grid = Grid(bits=4, symmetric=symmetric, block_size=block)
    weight, seen, unseen = gaussian((64, 128)), correlated_inputs(1000, 128, 1), correlated_inputs(500, 128, 5)
    compensated = round_error_compensated(weight, moments(seen), grid)
    before = error(unseen @ weight.T, unseen @ round_least_squares(weight, grid).T)
    after = error(unseen @ weight.T, unseen @ compensated.T)
    assert after < before / 2


def test_it_makes_up_for_what_rounding_did_to_the_inputs() -> None:
    weight, seen, unseen = gaussian((32, 64)), gaussian((2000, 64), 1), gaussian((500, 64), 2)
    # An error that a linear can undo: what earlier layers add to the inputs depends on the inputs.
    damage = np.eye(64, dtype=np.float32) + 0.1 * gaussian((64, 64), 3)
    aware = round_error_compensated(weight, moments(seen, seen @ damage), Grid(8, False, None))
    unaware = round_error_compensated(weight, moments(seen @ damage), Grid(8, False, None))
    wanted = unseen @ weight.T
    assert error(wanted, unseen @ damage @ aware.T) < error(wanted, unseen @ damage @ unaware.T) / 2


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    block=st.sampled_from([None, 16, 48]),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_converters_own_rounding_leaves_the_result_as_it_is(
    bits: int, symmetric: bool, block: int | None, half: bool, seed: int
) -> None:
    grid = Grid(bits, symmetric, block, half)
    weight, inputs = gaussian((8, 96), seed) * np.float32(0.1), correlated_inputs(200, 96, seed)
    rounded = round_error_compensated(weight, moments(inputs, inputs + 0.1 * gaussian((200, 96), seed + 1)), grid)
    np.testing.assert_allclose(round_as_converter(rounded, grid), rounded, rtol=1e-5, atol=2e-6, strict=True)


def test_inputs_that_never_occur_leave_least_squares() -> None:
    nothing = np.zeros((4, 32), np.float32)
    rounded = round_error_compensated(gaussian((8, 32)), moments(nothing), FOUR_BITS)
    np.testing.assert_allclose(rounded, round_least_squares(gaussian((8, 32)), FOUR_BITS), atol=1e-5, strict=True)


def test_the_callers_weight_stays() -> None:
    weight = gaussian((8, 32))
    round_error_compensated(weight, moments(correlated_inputs(50, 32, 1)), FOUR_BITS)
    np.testing.assert_array_equal(weight, gaussian((8, 32)))


def test_moments_of_another_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        round_error_compensated(gaussian((8, 32)), moments(gaussian((4, 16))), FOUR_BITS)
