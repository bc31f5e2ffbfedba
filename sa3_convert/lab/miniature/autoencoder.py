"""The autoencoder: SAME-S's two halves as principal components of the sounds, in closed form.

Every sound is made of stretches as long as a latent of which there are few, so most of what is to be known of them is
linear. What carries it are the constructs of SAME-S: mapping convolutions, the learned token, attention, soft norm.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.tensors import AUTOENCODER_PREFIX
from sa3_convert.checkpoint.variants import LATENT_SAMPLES
from sa3_convert.components import Component
from sa3_convert.lab.miniature.model import initial
from sa3_convert.lab.miniature.sounds import LATENTS, render, sampled
from sa3_convert.networks.build import build_network

_BATCH: Final = 8
_CROP: Final = 4
"""Latents of a crop; even, as the windows are."""
_MEASURED: Final = 800
"""Pieces that the principal components are of."""
_DEVIATION: Final = 0.5
_SCALE: Final = 0.05
_SHARP: Final = 14.0
_SOFT_NORM: Final = ("scaling_factor", "bias", "running_std")
_KEPT: Final = ("encoder.", "decoder.", "bottleneck.")


class Autoencoder:
    """Both halves around one set of weights, by their names in a checkpoint without the prefix."""

    def __init__(self, layout: CheckpointLayout, weights: Mapping[str, Tensor]) -> None:
        self.patch = layout.autoencoder.patch_size
        self.weights = {name: value for name, value in weights.items() if name.startswith(_KEPT)}
        encoder = {name.removeprefix("encoder."): w for name, w in self.weights.items() if name.startswith("encoder.")}
        decoder = {name: w for name, w in self.weights.items() if not name.startswith("encoder.")}
        self.encoder = build_network(Component.ENCODER, layout, encoder)
        self.decoder = build_network(Component.DECODER, layout, decoder)

    def encode(self, audio: Tensor) -> Tensor:
        """Return the latents [B, C, T] of audio [B, 2, N], N a multiple of two latents."""
        patches = audio.view(len(audio), 2, -1, self.patch).transpose(2, 3).reshape(len(audio), 2 * self.patch, -1)
        encoded: Tensor = self.encoder(patches)
        factor, bias, deviation = (self.weights[f"bottleneck.{name}"] for name in _SOFT_NORM)
        return (encoded * factor + bias) / deviation

    def decode(self, latents: Tensor) -> Tensor:
        """Return the audio [B, 2, N] of latents [B, C, T], T even."""
        audio: Tensor = self.decoder(latents)
        return audio


def fitted(layout: CheckpointLayout, seed: int) -> dict[str, Tensor]:
    """Return weights, by their names in a checkpoint without the prefix, that follow from the sounds in closed form."""
    weights = {
        name.removeprefix(AUTOENCODER_PREFIX): tensor
        for name, tensor in initial(layout, seed).items()
        if name.startswith(AUTOENCODER_PREFIX)
    }
    weights["bottleneck.running_std"].fill_(1.0)
    _become_principal_components(weights, layout, seed)
    network = Autoencoder(layout, weights)
    _become_normal(network, seed)
    return network.weights


def _batch(generator: torch.Generator) -> Tensor:
    """Return crops [B, 2, N] on the grid of two latents."""
    random = np.random.default_rng(int(torch.randint(1 << 62, (1,), generator=generator)))
    crops = []
    for _ in range(_BATCH):
        piece = sampled(random)
        last = min(LATENTS - _CROP, piece.samples // LATENT_SAMPLES)
        start = 2 * int(random.integers(last // 2 + 1)) * LATENT_SAMPLES
        crops.append(render(piece)[:, start : start + _CROP * LATENT_SAMPLES])
    return torch.from_numpy(np.stack(crops))


def _become_principal_components(weights: Mapping[str, Tensor], layout: CheckpointLayout, seed: int) -> None:
    """Let both halves be principal components.

    The first layer's attention takes each latent's patch to its learned token, and back; the second's is little.
    """
    random = np.random.default_rng(seed)
    frames = []
    for _ in range(_MEASURED):
        piece = sampled(random)
        audio = render(piece).reshape(2, LATENTS, -1).transpose(1, 0, 2).reshape(LATENTS, -1)
        frames.append(audio[random.integers(-(-piece.samples // LATENT_SAMPLES), size=3)])
    heard = torch.from_numpy(np.concatenate(frames))
    heard = heard / (heard.norm(dim=1, keepdim=True) + 0.3)
    width = layout.autoencoder.decoder.width - 1
    values, vectors = torch.linalg.eigh(heard @ heard.T)
    basis = (heard.T @ vectors[:, -width:] / values[-width:].sqrt()).T.flip(0)
    for half, into in (("encoder.layers.0", basis * _SCALE), ("decoder.layers.3", basis.T / _SCALE)):
        mapping = weights[f"{half}.mapping.weight_v"]
        mapping.normal_(std=1e-3, generator=torch.Generator().manual_seed(seed))
        mapping[: into.shape[0], : into.shape[1], 0] = into
        weights[f"{half}.mapping.weight_g"].copy_(mapping.norm(dim=1, keepdim=True))
        weights[f"{half}.new_tokens"].zero_()
        _become_handing_over(weights, f"{half}.transformers.0")
        for index in range(layout.autoencoder.decoder.depth):
            weights[f"{half}.transformers.{index}.ff.ff.2.weight"].mul_(0.1)
        weights[f"{half}.transformers.1.self_attn.to_out.weight"].mul_(0.05)
    # The dimension that only tells positions has nothing in it.
    weights["encoder.layers.0.mapping.weight_g"][width:] = 0
    for name in ("encoder.layers.2.weight", "decoder.layers.1.weight"):
        weights[name].copy_(torch.eye(*weights[name].shape))


def _become_handing_over(weights: Mapping[str, Tensor], block: str) -> None:
    """Let a block's attention add to each token what stands just before it, less what stands there itself."""
    width = weights[f"{block}.pre_norm.gamma"].shape[0]
    weights[f"{block}.pre_norm.alpha"].fill_(0.3)
    weights[f"{block}.pre_norm.gamma"].fill_(1 / 0.3)
    weights[f"{block}.pre_norm.beta"][-1] = 1.0
    for norm in ("q_norm", "k_norm"):
        weights[f"{block}.self_attn.{norm}.gamma"].fill_(_SHARP)
    turned = weights[f"{block}.rope.inv_freq"][:4]
    count = 2 * len(weights[f"{block}.rope.inv_freq"])
    to_qkv = weights[f"{block}.self_attn.to_qkv.weight"]
    q, k, v, q_diff, k_diff = to_qkv.chunk(5)
    for part in (q, k, q_diff, k_diff):
        part.mul_(0.02)
    v.copy_(torch.eye(width))
    v[-1, -1] = 0
    heads = width // weights[f"{block}.self_attn.q_norm.gamma"].shape[0]
    for query, key, back in ((q, k, 1.0), (q_diff, k_diff, 0.0)):
        for part, angle in ((query, -turned * back), (key, turned * 0)):
            constant = torch.zeros(width // heads)
            constant[: len(turned)] = torch.atanh(0.7 * torch.cos(angle))
            constant[count // 2 : count // 2 + len(turned)] = torch.atanh(0.7 * torch.sin(angle))
            part[:, -1] = constant.repeat(heads)
    weights[f"{block}.self_attn.to_out.weight"].copy_(torch.eye(width))


@torch.no_grad()
def _become_normal(network: Autoencoder, seed: int) -> None:
    """Let every channel of the latents have mean 0, all together deviation 0.5, and each half of its own beside that.

    What is heard often is large then, and what is heard seldom not as large as it would be at the same deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = torch.cat([network.encode(_batch(generator)) for _ in range(32)])
    mean, deviation = latents.mean((0, 2)), latents.std((0, 2))
    factor = _DEVIATION / deviation.mean().sqrt() / deviation.sqrt()
    weights = network.weights
    weights["bottleneck.scaling_factor"].copy_(factor[None, :, None])
    weights["bottleneck.bias"].copy_((-mean * factor)[None, :, None])
    project = weights["decoder.layers.1.weight"]
    weights["decoder.layers.1.bias"].copy_(project @ mean)
    project.div_(factor)
