"""The chosen plan fits, and its proof of optimality holds against every possible choice."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3_convert.errors import UsageError
from sa3_convert.lab.planner.allocation import Option, allocate, smallest_for_error

OPTION = st.builds(
    Option, bits=st.just(4), block_size=st.none(), size=st.integers(1, 50), error=st.floats(0.001, 100.0)
)
LAYERS = st.dictionaries(st.sampled_from("abcd"), st.lists(OPTION, min_size=1, max_size=4), min_size=1)


def all_choices(options: dict[str, list[Option]]) -> list[tuple[int, float]]:
    return [
        (sum(o.size for o in choice), sum(o.error for o in choice)) for choice in itertools.product(*options.values())
    ]


@settings(deadline=None)
@given(options=LAYERS, budget=st.integers(1, 220))
def test_no_choice_beats_the_bound_and_the_plan_fits(options: dict[str, list[Option]], budget: int) -> None:
    feasible = [error for size, error in all_choices(options) if size <= budget]
    if not feasible:
        with pytest.raises(UsageError):
            allocate(options, budget)
        return
    plan = allocate(options, budget)
    assert plan.size <= budget
    assert plan.bound <= min(feasible) * (1 + 1e-9)
    assert min(feasible) <= plan.error * (1 + 1e-9)


@settings(deadline=None)
@given(options=LAYERS, share=st.floats(0.0, 1.0))
def test_a_target_error_is_met(options: dict[str, list[Option]], share: float) -> None:
    errors = [error for _, error in all_choices(options)]
    target = min(errors) + share * (max(errors) - min(errors)) + 1e-9
    assert smallest_for_error(options, target).error <= target * (1 + 1e-9)


def test_the_sensitive_layer_gets_the_bits() -> None:
    def layer(weight: float) -> list[Option]:
        return [Option(bits, None, 100 * bits, weight * 4.0**-bits) for bits in (2, 4, 6, 8)]

    plan = allocate({"sensitive": layer(1000.0), "robust": layer(1.0)}, budget=1000)
    assert plan.chosen["sensitive"].bits == 8
    assert plan.chosen["robust"].bits == 2


def test_with_room_for_everything_the_best_of_each_is_taken_and_the_bound_is_met() -> None:
    options = {name: [Option(b, None, b, 1.0 / b) for b in range(2, 9)] for name in "abc"}
    plan = allocate(options, budget=100)
    assert all(option.bits == 8 for option in plan.chosen.values())
    assert plan.error == pytest.approx(plan.bound)


def test_asking_for_less_error_than_is_possible_is_refused() -> None:
    with pytest.raises(UsageError, match="No plan is that close"):
        smallest_for_error({"a": [Option(8, None, 1, 1.0)]}, target=0.5)
