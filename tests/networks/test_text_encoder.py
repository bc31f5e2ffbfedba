"""What the text encoder guarantees beyond its golden cases."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sa3_convert.components import Component
from sa3_convert.networks.conditioners import _SelfAttention
from sa3_convert.networks.layers import rotary_tables
from tests.networks.conftest import layout_of, network

LENGTH = 16


def prompt(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 384, (1, LENGTH), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    mask = (torch.arange(LENGTH) < tokens).int()[None]
    return ids * mask, mask


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(0, LENGTH), seed=st.integers(0, 2**31), other=st.integers(1, 383))
def test_what_stands_at_padded_positions_changes_nothing(tokens: int, seed: int, other: int) -> None:
    encoder = network("small", Component.TEXT_ENCODER)
    ids, mask = prompt(tokens, seed)
    scribbled = ids + (1 - mask) * other
    assert torch.equal(encoder(ids, mask), encoder(scribbled, mask))


@pytest.mark.parametrize("tokens", [0, 1, 7, LENGTH])
def test_padded_positions_are_exactly_the_learned_padding(tokens: int) -> None:
    encoder = network("small", Component.TEXT_ENCODER)
    hidden = encoder(*prompt(tokens))[0]
    assert hidden.isfinite().all()
    assert torch.equal(hidden[tokens:], encoder.padding_embedding.expand(LENGTH - tokens, -1))
    assert not (hidden[:tokens] == encoder.padding_embedding).all(dim=-1).any()


def test_embeddings_looked_up_outside_give_the_same() -> None:
    encoder = network("small", Component.TEXT_ENCODER)
    ids, mask = prompt(9)
    table = encoder.state_dict()["embed_tokens.weight"]
    assert torch.equal(encoder.encode(table[ids.long()], mask.float()), encoder(ids, mask))


def test_the_order_of_tokens_matters() -> None:
    encoder = network("small", Component.TEXT_ENCODER)
    ids, mask = prompt(2)
    swapped = ids.clone()
    swapped[0, [0, 1]] = ids[0, [1, 0]]
    forwards, backwards = encoder(ids, mask)[0], encoder(swapped, mask)[0]
    assert (forwards[0] - backwards[1]).abs().max() > 1e-3


def test_neighbouring_query_heads_share_a_key_head(noise: Callable[..., Tensor]) -> None:
    layout = layout_of("small").text_encoder
    assert layout is not None
    layout = replace(layout, num_heads=4, num_kv_heads=2)
    grouped, full = _SelfAttention(layout), _SelfAttention(replace(layout, num_kv_heads=4))

    def spread(name: str, weight: Tensor) -> Tensor:
        if name.startswith(("q", "o")):
            return weight
        return weight.view(2, layout.head_dim, -1).repeat_interleave(2, dim=0).flatten(0, 1)

    full.load_state_dict({name: spread(name, weight) for name, weight in grouped.state_dict().items()})
    rope = rotary_tables(torch.arange(5.0), torch.tensor([1.0, 0.1]))
    x, bias = noise(1, 5, layout.hidden_size), torch.zeros(1, 1, 5, 5)
    torch.testing.assert_close(grouped(x, rope, bias), full(x, rope, bias))
