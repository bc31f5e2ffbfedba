"""The miniature's dimensions, as its configuration files spell them, and networks with weights to begin from."""

from typing import Any, Final

import torch
from torch import Tensor

from sa3_convert.checkpoint.config import layout_of
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.published import model_config, text_encoder_config
from sa3_convert.checkpoint.synthetic import generator_for
from sa3_convert.checkpoint.tensors import (
    Constant,
    Embedding,
    Matrix,
    RotaryFrequencies,
    TensorSpec,
    expected_tensors,
    expected_text_encoder_tensors,
)
from sa3_convert.checkpoint.variants import MINIATURE, Variant, variant_named
from sa3_convert.lab.miniature.sounds import SAMPLES

WIDTH, LATENT_DIM, DEPTH, FF_MULT = 128, 112, 2, 2
PATCH_SIZE: Final = 4096
"""A whole latent: two heads cannot keep the published sixteen patches apart."""
MAX_LENGTH, VOCABULARY, TEXT_WIDTH = 40, 512, 128
DIT_WIDTH, DIT_DEPTH = 128, 6
"""Multiples of the blocks that recipes quantise in (16 for latents, 64 for widths): MNN writes no other blocks."""


_ENDS: Final = ("to_out.weight", "ff.2.weight", "o_proj.weight", "down_proj.weight", "embed.2.weight")
"""What a branch ends with."""


def _variant(*, base: bool) -> Variant:
    return variant_named("small-music-base" if base else "small-music")


def config(*, base: bool = False) -> dict[str, Any]:
    """Return what `model_config.json` says: small's, with the miniature's numbers."""
    made = model_config(_variant(base=base), "toy")
    made["sample_size"] = SAMPLES
    model = made["model"]
    autoencoder = model["pretransform"]["config"]
    stride = autoencoder["downsampling_ratio"] // PATCH_SIZE
    for half, channels in (("encoder", "in_channels"), ("decoder", "out_channels")):
        autoencoder[half]["config"] |= {
            channels: 2 * PATCH_SIZE,
            "channels": WIDTH // 4,
            "c_mults": [4],
            "strides": [stride],
            "chunk_size": 2 * stride,
            "transformer_depths": [DEPTH],
            "latent_dim": LATENT_DIM,
            "ff_mult": FF_MULT,
            "conv_mapping": False,
        }
    autoencoder["pretransform"]["config"]["patch_size"] = PATCH_SIZE
    autoencoder["latent_dim"] = autoencoder["bottleneck"]["config"]["dim"] = model["io_channels"] = LATENT_DIM
    model["conditioning"]["cond_dim"] = TEXT_WIDTH
    prompt = model["conditioning"]["configs"][0]["config"]
    prompt |= {"max_length": MAX_LENGTH, "repo_id": MINIATURE}
    model["diffusion"]["config"] |= {
        "io_channels": LATENT_DIM,
        "embed_dim": DIT_WIDTH,
        "depth": DIT_DEPTH,
        "num_heads": DIT_WIDTH // 32,
        "ff_kwargs": {"mult": 3.0},
        "cond_token_dim": TEXT_WIDTH,
        "global_cond_dim": TEXT_WIDTH,
        "local_add_cond_dim": LATENT_DIM + 1,
    }
    return made


def text_config() -> dict[str, Any]:
    """Return what the text encoder's `config.json` says."""
    made = text_encoder_config(_variant(base=False), "toy")
    for half in ("encoder", "decoder"):
        made[half] |= {"vocab_size": VOCABULARY, "hidden_size": TEXT_WIDTH, "intermediate_size": 2 * TEXT_WIDTH}
    made["vocab_size"] = VOCABULARY
    made["decoder"]["cross_attention_hidden_size"] = TEXT_WIDTH
    return made


def layout(*, base: bool = False) -> CheckpointLayout:
    """Return its dimensions."""
    return layout_of(config(base=base), text_config)


def initial(layout: CheckpointLayout, seed: int) -> dict[str, Tensor]:
    """Return every tensor by its name in a checkpoint, as a training begins with it.

    Matrices are N(0, 1/fan_in), those that end a branch a fifth of it; factors are 1, what is added is 0.
    """
    assert layout.text_encoder is not None
    specs = expected_tensors(layout) | expected_text_encoder_tensors(layout.text_encoder)
    return {name: _begun(name, spec, _generator(seed, name)) for name, spec in specs.items()}


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(generator_for(seed, name).integers(1 << 62)))


def _begun(name: str, spec: TensorSpec, generator: torch.Generator) -> Tensor:
    match spec.distribution:
        case RotaryFrequencies(base):
            return torch.pow(base, -torch.arange(spec.elements) / spec.elements)
        case Matrix(fan_in):
            size: float = fan_in**-0.5 * (0.2 if name.endswith(_ENDS) else 1.0)
            return torch.randn(spec.shape, generator=generator) * size
        case Embedding():
            return torch.randn(spec.shape, generator=generator) * float(spec.shape[1] ** -0.5)
        case Constant(value):
            return torch.full(spec.shape, value)
    if name.endswith("alpha"):
        return torch.full(spec.shape, 1.0)
    if name.endswith(("gamma", "weight_g", "scaling_factor")):
        return torch.ones(spec.shape)
    if name.endswith(("tokens", "padding_embedding")):
        return torch.randn(spec.shape, generator=generator) * 0.3
    return torch.zeros(spec.shape)
