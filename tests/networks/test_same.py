"""What SAME guarantees beyond its golden cases: locality, lengths, and the sliding window in its grouped form."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sa3_convert.components import Component
from sa3_convert.networks.autoencoder import Block, Decoder, Resampler, _Bands, latents_multiple
from sa3_convert.networks.layers import rotary_tables, rotate
from tests.networks.conftest import layout_of, network

Noise = Callable[..., Tensor]
PATCHES, SAMPLES = 16, 4096


def resampler(family: str, component: Component) -> Resampler:
    modules = network(family, component).modules()
    found: Resampler = next(module for module in modules if isinstance(module, Resampler))
    return found


def masked_block(block: Block, x: Tensor, reach: int) -> Tensor:
    """One sliding-window block over a whole sequence [N, width] with a full N×N mask and absolute positions."""
    attention = block.self_attn
    positions = torch.arange(len(x), dtype=torch.float32)
    tables = rotary_tables(positions, block.rope.get_buffer("inv_freq"))
    hidden = (positions[:, None] - positions[None, :]).abs() > reach
    q, k, v, q_diff, k_diff = (
        part.view(len(x), -1, attention.head_dim).transpose(0, 1)
        for part in attention.to_qkv(block.pre_norm(x)).chunk(5, dim=-1)
    )

    def attended(query: Tensor, key: Tensor) -> Tensor:
        query, key = rotate(attention.q_norm(query), *tables), rotate(attention.k_norm(key), *tables)
        logits = (query @ key.transpose(-1, -2) * attention.head_dim**-0.5).masked_fill(hidden, -torch.inf)
        weighted: Tensor = torch.softmax(logits, dim=-1) @ v
        return weighted

    difference = attended(q, k) - attended(q_diff, k_diff)
    x = x + attention.to_out(difference.transpose(0, 1).flatten(1))
    result: Tensor = x + block.ff(block.ff_norm(x))
    return result


@pytest.mark.parametrize("component", [Component.DECODER, Component.ENCODER])
@pytest.mark.parametrize("latents", [1, 2, 3, 9])
def test_the_grouped_sliding_window_equals_a_full_masked_attention(
    component: Component, latents: int, noise: Noise
) -> None:
    stack = resampler("medium", component)
    groups = noise(latents, stack.group, stack.width)
    expected = groups.flatten(0, 1)
    for block in stack.transformers:
        assert isinstance(block, Block)
        expected = masked_block(block, expected, stack.group)
    torch.testing.assert_close(stack.transform(groups, 1).flatten(0, 1), expected, rtol=0, atol=2e-5)


def test_a_band_hides_what_is_out_of_reach_and_what_lies_beyond_the_ends() -> None:
    bias = _Bands((2, 1), tokens=3)(torch.zeros(4, 3, 5), batch=1)[:, 0]
    for group in range(4):
        for token in range(3):
            for key in range(12):
                at, seen = group * 3 + token, (group - 2) * 3 + key
                visible = 0 <= seen < 12 and -6 <= seen - at <= 3
                assert (bias[group, token, key] == 0) == visible


@pytest.mark.parametrize("family", ["small", "medium"])
def test_each_part_of_a_batch_is_treated_by_itself(family: str, noise: Noise) -> None:
    decoder, encoder = network(family, Component.DECODER), network(family, Component.ENCODER)
    latents, patches = noise(3, 32, 4), noise(3, 512, 64)
    for half, batch in ((decoder, latents), (encoder, patches)):
        singles = torch.cat([half(batch[row : row + 1]) for row in range(3)])
        torch.testing.assert_close(half(batch), singles, rtol=0, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(pairs=st.integers(1, 6), data=st.data())
def test_a_same_s_latent_reaches_three_latents_at_most(pairs: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, 2 * pairs - 1))
    decoder = network("small", Component.DECODER)
    latents = torch.randn(1, 32, 2 * pairs, generator=torch.Generator().manual_seed(1))
    before = decoder(latents).view(2, -1, SAMPLES)
    latents[..., at] += 1
    changed = (decoder(latents).view(2, -1, SAMPLES) != before).any(dim=-1).any(dim=0)
    pair = at - at % 2
    reached = torch.zeros_like(changed)
    # Two latents of its own window, one more to each side through the shifted one, one patch more through the conv.
    reached[max(0, pair - 2) : pair + 4] = True
    assert changed[at]
    assert not changed[~reached].any()


@settings(max_examples=10, deadline=None)
@given(start=st.integers(0, 5), length=st.integers(1, 4))
def test_an_even_aligned_chunk_with_four_latents_around_it_equals_the_whole(start: int, length: int) -> None:
    decoder = network("small", Component.DECODER)
    latents = torch.randn(1, 32, 20, generator=torch.Generator().manual_seed(2))
    first, last = 2 * start, 2 * (start + length)
    begin, end = max(0, first - 4), min(20, last + 4)
    whole = decoder(latents)[..., first * SAMPLES : last * SAMPLES]
    chunk = decoder(latents[..., begin:end])[..., (first - begin) * SAMPLES : (last - begin) * SAMPLES]
    torch.testing.assert_close(chunk, whole, rtol=0, atol=1e-5)


def test_sliding_windows_do_not_depend_on_where_in_the_sequence_they_lie(noise: Noise) -> None:
    decoder, latents = network("medium", Component.DECODER), noise(1, 32, 24)
    # Two layers reach two groups to each side.
    whole = decoder(latents)[..., 10 * SAMPLES : 14 * SAMPLES]
    chunk = decoder(latents[..., 8:16])[..., 2 * SAMPLES : 6 * SAMPLES]
    torch.testing.assert_close(chunk, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "latents", "decoded"), [("small", 5, 6), ("small", 6, 6), ("medium", 5, 5)])
def test_an_odd_number_of_latents_is_completed_for_same_s_only(
    family: str, latents: int, decoded: int, noise: Noise
) -> None:
    assert network(family, Component.DECODER)(noise(1, 32, latents)).shape == (1, 2, decoded * SAMPLES)
    patches = noise(1, 512, latents * PATCHES)
    assert network(family, Component.ENCODER)(patches).shape == (1, 32, decoded)


def test_incomplete_patches_are_completed_with_silence(noise: Noise) -> None:
    encoder, patches = network("medium", Component.ENCODER), noise(1, 512, 3 * PATCHES)
    patches[..., -5:] = 0
    assert torch.equal(encoder(patches[..., :-5]), encoder(patches))


def test_the_decoder_is_deterministic(noise: Noise) -> None:
    decoder, latents = network("small", Component.DECODER), noise(1, 32, 4)
    assert torch.equal(decoder(latents), decoder(latents))


def test_latents_come_in_pairs_for_same_s_and_singly_for_same_l() -> None:
    assert latents_multiple(layout_of("small").autoencoder.decoder) == 2
    assert latents_multiple(layout_of("medium").autoencoder.decoder) == 1


def test_the_latent_scale_is_the_bottlenecks(noise: Noise) -> None:
    decoder = network("small", Component.DECODER)
    assert isinstance(decoder, Decoder)
    projected: list[Tensor] = []
    hook = decoder.decoder.layers[1].register_forward_pre_hook(lambda _, args: projected.append(args[0]))
    latents = noise(1, 32, 2)
    try:
        decoder(latents)
    finally:
        hook.remove()
    assert torch.equal(projected[0], (latents * decoder.bottleneck.running_std).transpose(1, 2))
