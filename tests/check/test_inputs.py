"""Inputs that a judgement can rest on: of the contract's shapes, repeatable, and with the statistics of real use."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3_convert.check.inputs import SAMPLER_STEPS, sample_inputs, text_regions
from sa3_convert.checkpoint.config import read_layout
from sa3_convert.components import SPECS, Component, contract
from tests.conftest import GOLDEN

LAYOUT = read_layout(GOLDEN / "small" / "checkpoint")


@settings(max_examples=60, deadline=None)
@given(component=st.sampled_from(Component), seed=st.integers(0, 200), latents=st.integers(1, 20))
def test_samples_are_what_the_contract_says(component: Component, seed: int, latents: int) -> None:
    sample = sample_inputs(component, LAYOUT, seed=seed, latents=latents)
    real = latents + latents % 2 if SPECS[component].even_latents else latents
    ports = contract(component, LAYOUT).inputs
    assert list(sample.feeds) == [port.name for port in ports]
    for port in ports:
        array = sample.feeds[port.name]
        assert (array.shape, str(array.dtype)) == (port.concrete(real), port.dtype)
        assert np.isfinite(array).all()


@pytest.mark.parametrize("component", Component)
def test_the_same_seed_gives_the_same_arrays_and_another_gives_others(component: Component) -> None:
    first = sample_inputs(component, LAYOUT, seed=5, latents=4).feeds
    again = sample_inputs(component, LAYOUT, seed=5, latents=4).feeds
    other = sample_inputs(component, LAYOUT, seed=6, latents=4).feeds
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_prompts_are_padded_on_the_right_and_masked_there() -> None:
    counts = set()
    for seed in range(12):
        sample = sample_inputs(Component.TEXT_ENCODER, LAYOUT, seed=seed, latents=1)
        ids, mask = sample.feeds["input_ids"][0], sample.feeds["attention_mask"][0]
        count = sample.regions[0].stop
        assert count is not None
        assert (ids[:count] > 0).all()
        assert (ids < LAYOUT.text_encoder.vocab_size).all()  # type: ignore[union-attr]
        assert not ids[count:].any()
        np.testing.assert_array_equal(mask, np.arange(mask.size) < count)
        counts.add(count)
    assert max(counts) == LAYOUT.text_encoder.max_length  # type: ignore[union-attr]
    assert len(counts) >= 4


def test_prompt_and_padding_rows_are_judged_apart() -> None:
    rows = np.arange(16).reshape(1, 16, 1)
    prompt, padding = text_regions(5, 16)
    assert prompt.of(rows).ravel().tolist() == [0, 1, 2, 3, 4]
    assert padding.of(rows).ravel().tolist() == list(range(5, 16))
    assert [region.label for region in text_regions(16, 16)] == [""]
    assert [region.label for region in text_regions(0, 16)] == ["padding"]


def test_durations_cover_the_range_and_both_its_ends() -> None:
    seconds = [
        float(sample_inputs(Component.NUMBER_CONDITIONER, LAYOUT, seed=s, latents=1).feeds["seconds"][0])
        for s in range(64)
    ]
    assert 0.0 in seconds
    assert 384.0 in seconds
    assert max(np.diff(sorted(seconds))) < 150
    assert len(set(seconds)) == 64


def test_noise_levels_are_those_of_the_sampler_each_once() -> None:
    samples = [sample_inputs(Component.DIT, LAYOUT, seed=seed, latents=8) for seed in range(2 * SAMPLER_STEPS)]
    each = [float(sample.feeds["t"][0]) for sample in samples]
    levels = each[:SAMPLER_STEPS]
    assert levels[0] == 1.0
    assert len(set(levels)) == SAMPLER_STEPS
    assert each[SAMPLER_STEPS:] == levels
    assert levels[4] == pytest.approx(1 / (1 + np.exp(2.0 - 4.1)))  # the fourth step of eight


def test_the_dits_input_has_unit_scale_at_both_ends_of_the_schedule() -> None:
    for seed in range(4):
        feeds = sample_inputs(Component.DIT, LAYOUT, seed=seed, latents=64).feeds
        t = float(feeds["t"][0])
        assert feeds["x"].std() == pytest.approx(np.hypot(t, 1 - t), rel=0.05)


def test_padding_stands_at_the_end_and_is_not_compared() -> None:
    padded = []
    for seed in range(8):
        sample = sample_inputs(Component.DIT, LAYOUT, seed=seed, latents=20)
        mask = sample.feeds["padding_mask"][0]
        (region,) = sample.regions
        np.testing.assert_array_equal(region.of(np.arange(20).reshape(1, 1, 20))[0, 0], np.flatnonzero(mask))
        padded.append(20 - int(mask.sum()))
    assert {0, 1, 2, 5} == set(padded)


def test_the_inpainting_condition_is_the_masked_latents() -> None:
    local = sample_inputs(Component.DIT, LAYOUT, seed=2, latents=9).feeds["local_add_cond"]
    assert local[0, 0].tolist() == [1] * 3 + [0] * 6
    assert local[0, 1:, :3].all()
    assert not local[0, 1:, 3:].any()
    assert not sample_inputs(Component.DIT, LAYOUT, seed=0, latents=9).feeds["local_add_cond"].any()


def test_text_rows_have_unit_root_mean_square_and_padding_repeats_one_row() -> None:
    rows = sample_inputs(Component.DIT, LAYOUT, seed=1, latents=2).feeds["cross_attn_cond"][0]
    scale = np.sqrt((rows**2).mean(axis=1))
    assert scale[0] == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(rows[-2], rows[-3])


def test_audio_is_band_limited_and_within_full_scale() -> None:
    sample = sample_inputs(Component.ENCODER, LAYOUT, seed=0, latents=8).feeds["patched_audio"]
    assert np.abs(sample).max() <= 1
    left = sample[0, :256].T.reshape(-1)
    power = np.abs(np.fft.rfft(left)) ** 2
    edge = int(17000 / 44100 * left.size)
    assert power[edge:].sum() < 1e-2 * power.sum()
    assert left.std() > 0.05
