"""The judge is judged: figures worked out by hand, and everything that must fail before any figure."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from sa3_convert.check import metrics
from sa3_convert.check.metrics import MAX_DB, compare, sums_of
from sa3_convert.errors import VerificationError


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def test_figures_are_those_worked_out_by_hand() -> None:
    # reference² = 25, error = (0, 1): noise 1; cosine = (9 + 20) / (5·√34)
    result = compare(f32(3, 4), f32(3, 5))
    assert result.signal_to_noise_db == pytest.approx(10 * math.log10(25), abs=1e-12)
    assert result.cosine == pytest.approx(29 / (5 * math.sqrt(34)), abs=1e-15)
    assert result.max_abs_error == 1
    assert result.mean_abs_error == 0.5


def test_one_bad_element_among_a_million_shows_in_every_figure() -> None:
    reference = np.ones(1_000_000, np.float32)
    target = reference.copy()
    target[777_777] = 1001
    result = compare(reference, target)
    assert result.signal_to_noise_db == pytest.approx(0.0, abs=1e-12)
    assert result.cosine == pytest.approx(1_001_000 / math.sqrt(1e6 * (999_999 + 1001**2)), abs=1e-12)
    assert result.max_abs_error == 1000
    assert result.mean_abs_error == pytest.approx(1e-3, abs=1e-15)


def test_the_last_element_counts_beyond_the_piece_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PIECE", 4)
    assert compare(np.ones(9, np.float32), f32(*[1] * 8, 4)).max_abs_error == 3


def test_identical_arrays_get_the_bound_and_stay_valid_json() -> None:
    result = compare(f32(1, 2), f32(1, 2))
    assert (result.signal_to_noise_db, result.cosine, result.max_abs_error) == (MAX_DB, 1.0, 0.0)
    assert json.loads(json.dumps(asdict(result), allow_nan=False))["signal_to_noise_db"] == MAX_DB


def test_zeros_against_zeros_are_identical() -> None:
    assert compare(np.zeros(3, np.float32), np.zeros(3, np.float32)).signal_to_noise_db == MAX_DB


def test_anything_against_a_zero_reference_is_as_bad_as_can_be() -> None:
    result = compare(f32(0, 0), f32(0, 1e-20))
    assert (result.signal_to_noise_db, result.cosine) == (-MAX_DB, 0.0)


def test_an_all_zero_target_has_0_db_and_no_direction() -> None:
    result = compare(f32(3, 4), f32(0, 0))
    assert (result.signal_to_noise_db, result.cosine, result.mean_abs_error) == (0.0, 0.0, 3.5)


def test_all_constant_arrays_compare_by_value() -> None:
    result = compare(np.full(10, 2, np.float32), np.full(10, 3, np.float32))
    assert result.signal_to_noise_db == pytest.approx(10 * math.log10(4))
    assert result.cosine == pytest.approx(1.0)


def test_a_sign_error_is_a_cosine_of_minus_one() -> None:
    assert compare(f32(1, -2), f32(-1, 2)).cosine == pytest.approx(-1.0)


def test_float16_sums_beyond_its_range_stay_exact() -> None:
    big = np.full(1000, 60000, np.float16)
    off = np.full(1000, 59968, np.float16)
    result = compare(big, off)
    assert result.signal_to_noise_db == pytest.approx(20 * math.log10(60000 / 32))
    assert result.mean_abs_error == 32


def test_a_float16_target_that_overflowed_is_refused() -> None:
    with np.errstate(over="ignore"):
        overflowed = np.array([1e6, 1], np.float32).astype(np.float16)
    with pytest.raises(VerificationError, match=r"target's output holds NaN or infinity in 1 of 2"):
        compare(np.array([1, 1], np.float16), overflowed)


def test_float32_at_both_ends_of_its_range_stays_finite() -> None:
    top = np.finfo(np.float32).max
    assert math.isfinite(compare(f32(top, top), f32(-top, -top)).signal_to_noise_db)
    tiny = np.finfo(np.float32).smallest_subnormal
    assert compare(f32(tiny), f32(2 * tiny)).signal_to_noise_db == pytest.approx(0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_on_either_side_fails_before_any_figure(bad: float) -> None:
    with pytest.raises(VerificationError, match="The target's audio holds NaN or infinity"):
        compare(f32(1, 2), f32(1, bad), what="audio")
    with pytest.raises(VerificationError, match="The reference's audio holds NaN or infinity"):
        compare(f32(1, bad), f32(1, 2), what="audio")


def test_two_nans_in_the_same_place_are_no_agreement() -> None:
    with pytest.raises(VerificationError, match="NaN"):
        compare(f32(math.nan), f32(math.nan))


@pytest.mark.parametrize(
    ("reference", "target", "message"),
    [
        (np.ones((2, 3), np.float32), np.ones((3, 2), np.float32), r"shape \[3, 2\], the reference's \[2, 3\]"),
        (np.ones((1, 3), np.float32), np.ones(3, np.float32), "shape"),
        (np.ones(3, np.float32), np.ones(1, np.float32), "shape"),
        (np.ones(3, np.float32), np.ones(3, np.float16), "is float16, the reference's float32"),
        (np.ones(3, np.float32), np.ones(3, np.float64), "only float16 and float32"),
        (np.ones(3, np.int32), np.ones(3, np.int32), "only float16 and float32"),
        (np.ones((0, 3), np.float32), np.ones((0, 3), np.float32), r"empty \(shape \[0, 3\]\)"),
        (None, np.ones(3, np.float32), "reference's output is missing"),
        (np.ones(3, np.float32), None, "target's output is missing"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    reference: NDArray[np.float32] | None, target: NDArray[np.float32] | None, message: str
) -> None:
    with pytest.raises(VerificationError, match=message):
        compare(reference, target)


def test_arrays_that_are_not_contiguous_compare_by_position() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert compare(array.T, np.ascontiguousarray(array.T)).max_abs_error == 0


ARRAYS = hnp.arrays(np.float32, st.integers(2, 40), elements=st.integers(-8000, 8000).map(lambda n: n / 8))


@given(reference=ARRAYS, scale=st.floats(0.5, 2))
def test_the_ratio_does_not_depend_on_a_common_scale(reference: NDArray[np.float32], scale: float) -> None:
    factor = np.float32(2 ** round(math.log2(scale) * 4))
    target = reference[::-1].copy()
    first, second = compare(reference, target), compare(reference * factor, target * factor)
    assert second.signal_to_noise_db == pytest.approx(first.signal_to_noise_db, abs=1e-6)


@given(reference=ARRAYS, cut=st.integers(1, 39))
def test_sums_of_parts_add_up_to_the_sums_of_the_whole(reference: NDArray[np.float32], cut: int) -> None:
    target, cut = reference + np.float32(0.5), min(cut, reference.size - 1)
    parts = sums_of(reference[:cut], target[:cut]) + sums_of(reference[cut:], target[cut:])
    whole = sums_of(reference, target)
    assert asdict(parts) == pytest.approx(asdict(whole), rel=1e-9)


@given(reference=ARRAYS, target=ARRAYS)
def test_every_figure_is_finite(reference: NDArray[np.float32], target: NDArray[np.float32]) -> None:
    size = min(reference.size, target.size)
    assert all(math.isfinite(value) for value in asdict(compare(reference[:size], target[:size])).values())
