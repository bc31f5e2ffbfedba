"""Reference against target on the same cases; whatever cannot be compared fails."""

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.check.compare import verify_sessions
from sa3_convert.check.inputs import sample_inputs
from sa3_convert.check.metrics import MAX_DB
from sa3_convert.check.results import ComponentFidelity
from sa3_convert.components import Component
from sa3_convert.errors import VerificationError
from tests.lab.bisect.sessions import LAYOUT, Change, StandIn


def compared(reference: StandIn, target: StandIn, *cases: tuple[int, int]) -> ComponentFidelity:
    """Compare two sessions of a component on pairs of length and seed."""
    component = reference.component
    samples = [sample_inputs(component, LAYOUT, seed=seed, latents=length) for length, seed in cases]
    return verify_sessions(lambda: reference, lambda: target, component, LAYOUT, samples)


CASES = tuple(itertools.product((4, 6), (0, 1)))


def verify(component: Component, change: Change, *cases: tuple[int, int]) -> ComponentFidelity:
    return compared(StandIn(component), StandIn(component, change), *(cases or CASES))


@pytest.mark.parametrize("component", Component)
def test_a_faithful_target_is_as_close_as_can_be(component: Component) -> None:
    result = verify(component, lambda array: array)
    assert result.worst.signal_to_noise_db == MAX_DB
    assert result.worst.max_abs_error == 0


def test_every_sample_is_measured_in_order() -> None:
    result = verify(Component.DECODER, lambda array: array)
    assert [m.case for m in result.measurements] == ["seed=0 T=4", "seed=1 T=4", "seed=0 T=6", "seed=1 T=6"]


def test_both_sessions_get_the_same_feeds() -> None:
    reference, target = StandIn(Component.DIT), StandIn(Component.DIT)
    compared(reference, target, (5, 0), (5, 1), (5, 2))
    for ours, theirs in zip(reference.calls, target.calls, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_all_runs_of_the_reference_come_before_those_of_the_target() -> None:
    order: list[str] = []

    def session(name: str) -> StandIn:
        def note(array: NDArray[Any]) -> NDArray[Any]:
            order.append(name)
            return array

        return StandIn(Component.DECODER, note)

    compared(session("r"), session("t"), (2, 0), (2, 1))
    assert order == ["r", "r", "t", "t"]


def test_a_scaled_output_has_the_ratio_of_its_scale() -> None:
    result = verify(Component.DECODER, lambda array: array * np.float32(1.25))
    assert result.worst.signal_to_noise_db == pytest.approx(20 * np.log10(4), abs=1e-4)
    assert result.worst.cosine == pytest.approx(1)


def test_errors_at_padded_positions_of_the_dit_do_not_count() -> None:
    def spoil_the_last(array: NDArray[Any]) -> NDArray[Any]:
        array = array.copy()
        array[..., -1] += 100
        return array

    # Seed 1 has one padded position, seed 0 none.
    assert verify(Component.DIT, spoil_the_last, (8, 1)).worst.signal_to_noise_db == MAX_DB
    assert verify(Component.DIT, spoil_the_last, (8, 0)).worst.signal_to_noise_db < 0


def test_a_non_finite_value_counts_even_where_the_output_is_undefined() -> None:
    def spoil_the_last(array: NDArray[Any]) -> NDArray[Any]:
        array = array.copy()
        array[..., -1] = np.nan
        return array

    with pytest.raises(VerificationError, match=r"target's out \(dit, seed=1 T=8\) holds NaN"):
        verify(Component.DIT, spoil_the_last, (8, 1))


def test_wrong_padding_rows_of_a_text_encoding_are_not_hidden_by_the_prompt() -> None:
    def spoil_the_last(array: NDArray[Any]) -> NDArray[Any]:
        array = array.copy()
        array[:, -1] *= -1
        return array

    result = verify(Component.TEXT_ENCODER, spoil_the_last, (4, 0))
    assert result.worst_case.output == "last_hidden_state (padding)"
    prompt = next(m for m in result.measurements if m.output == "last_hidden_state")
    assert prompt.signal_to_noise_db == MAX_DB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: None, "target's audio .* is missing"),
        (lambda array: array[..., :-1], "shape"),
        (lambda array: array.astype(np.float16), "is float16"),
        (lambda array: array * np.nan, "NaN or infinity"),
        (lambda array: array[..., :0], "empty"),
    ],
)
def test_an_output_that_cannot_be_compared_fails_and_is_named(change: Change, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify(Component.DECODER, change)


def test_a_reference_that_breaks_the_contract_fails_even_if_the_target_agrees() -> None:
    def short(array: NDArray[Any]) -> NDArray[Any]:
        return array[..., :-1]

    with pytest.raises(VerificationError, match="the contract says"):
        compared(StandIn(Component.DECODER, short), StandIn(Component.DECODER, short), (2, 0))


def test_a_model_that_does_not_take_the_components_inputs_fails() -> None:
    class Picky(StandIn):
        def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
            raise ValueError("other.onnx takes seconds, not latents")

    with pytest.raises(VerificationError, match="takes seconds, not latents"):
        compared(Picky(Component.DECODER), StandIn(Component.DECODER), (2, 0))


def test_comparing_nothing_is_no_success() -> None:
    with pytest.raises(VerificationError, match="nothing was compared"):
        compared(StandIn(Component.DECODER), StandIn(Component.DECODER))


def test_the_ratio_in_halves_stands_beside_the_targets() -> None:
    component = Component.DECODER
    samples = [sample_inputs(component, LAYOUT, seed=seed, latents=4) for seed in range(2)]

    def verify(in_half: Change) -> ComponentFidelity:
        sessions = StandIn(component), StandIn(component), StandIn(component, in_half)
        reference, target, halved = ((lambda session=session: session) for session in sessions)
        return verify_sessions(reference, target, component, LAYOUT, samples, halved)

    assert compared(StandIn(component), StandIn(component), (4, 0)).half_db is None
    found = verify(lambda array: array * np.float32(1.25))
    assert found.half_db == pytest.approx(20 * np.log10(4), abs=1e-4)
    assert found.worst.signal_to_noise_db == MAX_DB
    # Beyond half's range there is nothing to compare.
    assert verify(lambda array: np.full_like(array, np.inf)).half_db == -MAX_DB
