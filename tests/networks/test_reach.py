"""How far a SAME-L output sees, measured by gradients on a network as deep as the published one."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from sa3_convert.checkpoint.dimensions import AutoencoderLayout
from sa3_convert.networks.autoencoder import Decoder, Encoder
from sa3_convert.networks.layers import Derived
from sa3_convert.runtime.autoencode import Reach
from tests.networks.conftest import layout_of

DEPTH = 12
SAMPLES, PATCHES = 4096, 16


def deep(kind: type[Decoder] | type[Encoder]) -> tuple[Any, AutoencoderLayout]:
    """Return a narrow network of the published depth with weights of the agreed statistics."""
    layout = layout_of("medium").autoencoder
    halves = {name: dataclasses.replace(getattr(layout, name), depth=DEPTH) for name in ("encoder", "decoder")}
    layout = dataclasses.replace(layout, **halves)
    network = kind(layout)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = {"gamma": 1.0, "alpha": 0.75, "weight_g": 1.0, "running_std": 0.83}.get(name.rpartition(".")[2], 0.0)
        spread = 0.1 if centre or parameter.ndim == 1 else max(1, parameter[0].numel()) ** -0.5
        parameter.data = centre + spread * noise
    for module in network.modules():
        if isinstance(module, Derived):
            buffer = module.rope.get_buffer("inv_freq")
            buffer.copy_(10000.0 ** (-torch.arange(len(buffer)) / len(buffer)))
            module.derive()
    return network, layout


def seen(kind: type[Decoder] | type[Encoder], latents: int, at: int) -> tuple[Tensor, Reach]:
    """Return by how much each input latent moves the output of latent `at`, and the reach that chunks assume."""
    network, layout = deep(kind)
    generator = torch.Generator().manual_seed(1)
    if kind is Decoder:
        x = torch.randn(1, layout.latent_dim, latents, generator=generator, requires_grad=True)
        network(x)[..., at * SAMPLES : (at + 1) * SAMPLES].square().sum().backward()
        gradient, reach = x.grad, Reach.of_decoder(layout.decoder)
    else:
        x = torch.randn(1, layout.encoder.io_channels, latents * PATCHES, generator=generator, requires_grad=True)
        network(x)[..., at].square().sum().backward()
        gradient, reach = x.grad, Reach.of_encoder(layout.encoder)
    assert gradient is not None
    return gradient.abs().amax(dim=1).view(latents, -1).amax(dim=1), reach


@pytest.mark.parametrize("kind", [Decoder, Encoder])
def test_same_l_sees_no_further_than_chunks_assume(kind: Any) -> None:
    at, latents = 15, 31
    moved, reach = seen(kind, latents, at)
    assert (reach.left, reach.right) == (DEPTH, DEPTH)
    inside = torch.zeros(latents, dtype=torch.bool)
    # Of the outermost group to the left only learned tokens are in sight: what counts is that it is there.
    inside[at - DEPTH + 1 : at + DEPTH + 1] = True
    assert (moved[~inside] == 0).all()
    assert (moved[inside] > 0).all()


def test_a_chunk_with_that_much_context_equals_the_whole() -> None:
    network, layout = deep(Decoder)
    reach = Reach.of_decoder(layout.decoder)
    latents = torch.randn(1, layout.latent_dim, 32, generator=torch.Generator().manual_seed(2))
    first, last = 14, 18
    with torch.no_grad():
        whole = network(latents)[..., first * SAMPLES : last * SAMPLES]
        chunk = network(latents[..., first - reach.left : last + reach.right])
        bare = network(latents[..., first:last])
    kept = chunk[..., reach.left * SAMPLES : (reach.left + last - first) * SAMPLES]
    torch.testing.assert_close(kept, whole, rtol=0, atol=1e-5)
    assert (bare - whole).abs().max() > 1e-2
