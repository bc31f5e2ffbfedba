from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.runtime.sampling import SAMPLERS, SamplerName, sigmas
from tests.conftest import Golden, assert_close_to_peak

Floats = NDArray[np.float32]
NAMES = list(SAMPLERS)
START = np.linspace(-2, 2, 24, dtype=np.float32).reshape(1, 4, 6)


def golden_velocity(x: Floats, t: np.float32) -> Floats:
    return np.tanh(x) * (np.float32(0.5) + t) - np.float32(0.1) * x


def no_noise(shape: Sequence[int]) -> Floats:
    raise AssertionError("this sampler draws no noise")


class Counted:
    """The velocity of a straight flow to one point, from wherever the latents stand."""

    def __init__(self, target: float) -> None:
        self.target = np.float32(target)
        self.times: list[float] = []

    def __call__(self, x: Floats, t: np.float32) -> Floats:
        assert x.dtype == np.float32
        assert isinstance(t, np.float32)
        self.times.append(float(t))
        return (x - self.target) / t


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_form_velocity_gives_the_golden_result(golden: Golden, name: str) -> None:
    case = next(c for c in golden.of("sampler") if c["sampler"] == name)
    tensors = golden.tensors
    draws = iter(tensors[case["step_noise"]])
    sampler = SAMPLERS[name]  # type: ignore[index]
    *_, last = sampler(
        golden_velocity, tensors[case["start"]], tensors[case["sigmas"]], lambda shape: next(draws).reshape(shape)
    )
    assert last.latents.dtype == np.float32
    assert_close_to_peak(last.latents, tensors[case["output"]], 2e-6)
    assert next(draws, None) is None


@pytest.mark.parametrize(("name", "evaluations"), [("pingpong", 5), ("euler", 5), ("rk4", 20), ("dpmpp", 5)])
def test_each_sampler_evaluates_the_velocity_as_often_as_its_order_needs(name: SamplerName, evaluations: int) -> None:
    velocity = Counted(0.25)
    steps = list(SAMPLERS[name](velocity, START, sigmas(5), lambda shape: np.zeros(shape, np.float32)))
    assert len(velocity.times) == evaluations
    assert min(velocity.times) > 0
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["euler", "rk4", "dpmpp"])
def test_a_straight_flow_is_followed_to_its_end(name: SamplerName) -> None:
    *_, last = SAMPLERS[name](lambda x, t: START - np.float32(0.25), START, sigmas(6), no_noise)
    np.testing.assert_allclose(last.latents, 0.25, atol=1e-6)


def test_pingpong_draws_once_a_step_and_the_last_draw_does_not_count() -> None:
    shapes = []

    def noise(shape: Sequence[int]) -> Floats:
        shapes.append(tuple(shape))
        return np.full(shape, np.float32(9))

    *_, last = SAMPLERS["pingpong"](Counted(0.25), START, sigmas(3), noise)
    assert shapes == [START.shape] * 3
    np.testing.assert_array_equal(last.latents, last.denoised)


@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_stops_when_its_consumer_does(name: SamplerName) -> None:
    velocity = Counted(0)
    sampler = SAMPLERS[name](velocity, START, sigmas(5), lambda shape: np.zeros(shape, np.float32))
    next(sampler)
    before = len(velocity.times)
    sampler.close()  # type: ignore[attr-defined]
    assert len(velocity.times) == before


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_left_as_it_was(name: SamplerName) -> None:
    start = START.copy()
    list(SAMPLERS[name](Counted(0), start, sigmas(3), lambda shape: np.zeros(shape, np.float32)))
    np.testing.assert_array_equal(start, START, strict=True)


def test_every_name_has_its_sampler() -> None:
    assert set(get_args(SamplerName)) == set(SAMPLERS)
