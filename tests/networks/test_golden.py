"""Every network against the reference implementation's own outputs, in float32."""

from typing import Any

import numpy as np
import pytest
import torch

from sa3_convert.components import Component
from tests.conftest import Golden, assert_close_to_peak, load_golden
from tests.networks.conftest import array, dit_inputs, network, tensor

FAMILIES = ("small", "medium")
# What float32 summation order may cost; the networks themselves stay below 1e-6.
PARITY = 1e-4


def cases(component: str) -> list[Any]:
    return [
        pytest.param(load_golden(family), case, id=f"{family}-{number}")
        for family in FAMILIES
        for number, case in enumerate(load_golden(family).of(component))
    ]


@pytest.mark.parametrize(("golden", "case"), cases("text_encoder"))
def test_the_text_encoder_equals_the_reference(golden: Golden, case: dict[str, Any]) -> None:
    encoder = network(golden.folder, Component.TEXT_ENCODER)
    ids, mask = (tensor(golden, case[name]).int() for name in ("input_ids", "attention_mask"))
    assert_close_to_peak(array(encoder(ids, mask)), golden.tensors[case["output"]], PARITY)


@pytest.mark.parametrize(("golden", "case"), cases("number_conditioner"))
def test_the_number_conditioner_equals_the_reference(golden: Golden, case: dict[str, Any]) -> None:
    conditioner = network(golden.folder, Component.NUMBER_CONDITIONER)
    embedding = conditioner(torch.tensor([case["seconds"]], dtype=torch.float32))
    # Not below: phases reach 6·10⁴ rad, and exp rounds the last bit of some frequencies otherwise on other processors:
    # 10⁻⁶ of the peak where the reference ran, 3·10⁻⁵ on one with AVX-512.
    assert_close_to_peak(array(embedding), golden.tensors[case["output"]], PARITY)


@pytest.mark.parametrize(("golden", "case"), cases("dit"))
@pytest.mark.parametrize("padding", ["key_mask", "value_zeroing"])
def test_the_dit_equals_the_reference_at_valid_positions(golden: Golden, case: dict[str, Any], padding: Any) -> None:
    dit = network(golden.folder, Component.DIT, padding)
    velocity = array(dit(*dit_inputs(golden, case)))
    expected = golden.tensors[case[f"output_{padding}"]]
    assert velocity.shape == expected.shape
    valid = case["valid"]
    assert_close_to_peak(velocity[..., :valid], expected[..., :valid], PARITY)


@pytest.mark.parametrize(("golden", "case"), cases("dit"))
@pytest.mark.parametrize("padding", ["key_mask", "value_zeroing"])
def test_a_mask_of_ones_equals_the_reference_without_a_mask(golden: Golden, case: dict[str, Any], padding: Any) -> None:
    dit = network(golden.folder, Component.DIT, padding)
    *inputs, mask = dit_inputs(golden, case)
    velocity = array(dit(*inputs, torch.ones_like(mask)))
    assert_close_to_peak(velocity, golden.tensors[case["output_no_mask"]], PARITY)


def test_the_golden_cases_tell_the_two_kinds_of_padding_apart(golden: Golden) -> None:
    case = next(case for case in golden.of("dit") if case["valid"] < case["latent_length"])
    masked, zeroed = (golden.tensors[case[f"output_{padding}"]] for padding in ("key_mask", "value_zeroing"))
    difference = np.abs(masked - zeroed)[..., : case["valid"]].max()
    assert difference > 100 * PARITY * np.abs(masked).max()


@pytest.mark.parametrize(("golden", "case"), cases("encoder"))
def test_the_encoder_equals_the_reference(golden: Golden, case: dict[str, Any]) -> None:
    encoder = network(golden.folder, Component.ENCODER)
    latents = encoder(tensor(golden, case["patched_audio"]))
    assert_close_to_peak(array(latents), golden.tensors[case["encoder_latent"]], PARITY)


@pytest.mark.parametrize(("golden", "case"), cases("decoder"))
def test_the_decoder_equals_the_reference(golden: Golden, case: dict[str, Any]) -> None:
    decoder = network(golden.folder, Component.DECODER)
    audio = decoder(tensor(golden, case["latents"]))
    assert_close_to_peak(array(audio), golden.tensors[case["audio"]], PARITY)
