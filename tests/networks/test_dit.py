"""What the diffusion transformer guarantees beyond its golden cases."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sa3_convert.components import Component
from sa3_convert.networks.dit import Padding
from tests.networks.conftest import network

Noise = Callable[..., Tensor]
FAMILIES = ("small", "medium")


def random_inputs(latents: int, batch: int = 1, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, 32, latents), (batch, 17, 64), (batch, 64), (batch, 33, latents))
    x, cross, embed, local = (torch.randn(shape, generator=g) for shape in shapes)
    return [x, torch.rand(batch, generator=g), cross, embed, local, torch.ones(batch, latents)]


@settings(max_examples=10, deadline=None)
@given(data=st.data(), family=st.sampled_from(FAMILIES), latents=st.integers(2, 24))
def test_what_stands_at_masked_positions_does_not_reach_valid_ones(
    data: st.DataObject, family: str, latents: int
) -> None:
    valid = data.draw(st.integers(1, latents - 1))
    dit = network(family, Component.DIT)
    inputs = random_inputs(latents)
    inputs[5][:, valid:] = 0
    before = dit(*inputs)
    inputs[0][..., valid:], inputs[4][..., valid:] = 7.0, -3.0
    after = dit(*inputs)
    assert torch.equal(before[..., :valid], after[..., :valid])


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_positions_at_the_end_equal_a_shorter_input(family: str) -> None:
    dit = network(family, Component.DIT)
    x, t, cross, embed, local, mask = random_inputs(20)
    mask[:, 13:] = 0
    short = dit(x[..., :13], t, cross, embed, local[..., :13], mask[:, :13])
    torch.testing.assert_close(dit(x, t, cross, embed, local, mask)[..., :13], short, rtol=0, atol=1e-5)


def test_zeroed_values_keep_their_softmax_weight() -> None:
    inputs = random_inputs(20)
    inputs[5][:, 13:] = 0
    masked = network("small", Component.DIT, "key_mask")(*inputs)
    zeroed = network("small", Component.DIT, "value_zeroing")(*inputs)
    assert (masked - zeroed)[..., :13].abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("latents", [1, 2, 3, 31])
def test_any_length_works_odd_ones_included(family: str, latents: int) -> None:
    velocity = network(family, Component.DIT)(*random_inputs(latents))
    assert velocity.shape == (1, 32, latents)
    assert velocity.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["key_mask", "value_zeroing"])
def test_a_batch_equals_its_members_one_by_one(family: str, padding: Padding) -> None:
    dit = network(family, Component.DIT, padding)
    inputs = random_inputs(9, batch=3)
    inputs[5][1, 6:] = 0
    singles = [dit(*(value[row : row + 1] for value in inputs)) for row in range(3)]
    torch.testing.assert_close(dit(*inputs), torch.cat(singles), rtol=0, atol=1e-5)


def test_memory_tokens_are_not_given_local_conditioning() -> None:
    dit = network("small", Component.DIT)
    block = dit.transformer.layers[0]
    seen: list[Tensor] = []
    watch = block.ff_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = random_inputs(5)
    dit(*inputs)
    louder = block.to_local_embed.register_forward_hook(lambda _, __, output: output + 1)
    try:
        dit(*inputs)
    finally:
        watch.remove()
        louder.remove()
    before, after = seen
    assert torch.equal(before[:, : block.memory], after[:, : block.memory])
    torch.testing.assert_close(after[:, block.memory :], before[:, block.memory :] + 1)
