import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from sa3_convert.checkpoint.dimensions import LogSnrShift, Shift
from sa3_convert.runtime.sampling import sigmas
from tests.conftest import Golden, load_golden

SIGMA_MAX = st.floats(2**-7, 1, width=32)


@pytest.mark.parametrize("family", ["small", "base", "medium"])
def test_every_golden_schedule_is_bitwise_equal(family: str) -> None:
    golden: Golden = load_golden(family)
    for case in golden.of("schedule"):
        actual = sigmas(case["steps"], case["sigma_max"])
        np.testing.assert_array_equal(actual, golden.tensors[case["output"]], strict=True)


def test_every_shift_gives_the_schedules_of_the_reference() -> None:
    """`tests/golden/sampling`: Stability-AI/stable-audio-3 at 636f906fc0ee54b3f06edf974dc7d3aa99d6841b."""
    golden = load_golden("sampling")
    kinds = set()
    for case in golden.of("schedule"):
        shift = TypeAdapter[Shift](Shift).validate_python(case["shift"])
        kinds.add(shift.type)
        actual = sigmas(case["steps"], case["sigma_max"], shift, case["length"])
        # Two units of the last place: exponentials of other libraries differ by one.
        np.testing.assert_allclose(actual, golden.tensors[case["output"]], rtol=2.4e-7, strict=True)
    assert kinds == {"none", "logsnr", "flux", "full"}


def test_the_length_counts_only_where_a_shift_has_a_rate() -> None:
    steady, moving = LogSnrShift(rate=0.0), LogSnrShift()
    np.testing.assert_array_equal(sigmas(8, 1.0, steady, 100), sigmas(8, 1.0, steady, 2000))
    assert (sigmas(8, 1.0, moving, 2000) > sigmas(8, 1.0, moving, 1000))[1:-1].all()


@given(steps=st.integers(1, 300), sigma_max=SIGMA_MAX)
@settings(max_examples=100, deadline=None)
def test_any_schedule_is_torchs_to_the_last_bit_of_its_exponential(steps: int, sigma_max: float) -> None:
    expected = torch.sigmoid(-(2.0 - torch.linspace(sigma_max, 0, steps + 1) * 8.2)).numpy()
    np.testing.assert_allclose(sigmas(steps, sigma_max)[1:-1], expected[1:-1], rtol=2.4e-7, strict=True)


@given(steps=st.integers(1, 300), sigma_max=SIGMA_MAX)
@settings(max_examples=100, deadline=None)
def test_a_schedule_starts_at_sigma_max_and_ends_at_zero(steps: int, sigma_max: float) -> None:
    schedule = sigmas(steps, sigma_max)
    assert schedule.shape == (steps + 1,)
    assert schedule[0] == np.float32(sigma_max)
    assert schedule[-1] == 0
    assert (schedule >= 0).all()


@given(steps=st.integers(1, 300))
def test_from_full_noise_the_times_fall(steps: int) -> None:
    assert (np.diff(sigmas(steps)) < 0).all()


@pytest.mark.parametrize(("steps", "sigma_max"), [(0, 1.0), (-1, 1.0), (4, 0.0), (4, 1.5), (4, float("nan"))])
def test_a_schedule_without_steps_or_outside_the_unit_interval_is_refused(steps: int, sigma_max: float) -> None:
    with pytest.raises(ValueError, match=r"steps|sigma_max"):
        sigmas(steps, sigma_max)
