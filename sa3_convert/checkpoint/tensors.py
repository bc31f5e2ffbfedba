"""Every tensor of a checkpoint, from its layout: name, shape, stored type and seeded distribution.

One table serves the reader (which holds a file to it) and the synthesizer (which fills a file by it). With the
published dimensions it gives exactly the published tensor counts and byte sizes. The distributions are those that
figures are compared on: matrices N(0, 1/fan_in), γ 1 + 0.2·N, β, biases and other vectors 0.1·N, α uniform 0.5..1,
gains uniform 0.5..1.5, learned tokens 0.3·N, memory tokens 0.5·N, running_std 0.83, embedding 0.05·N.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from sa3_convert.checkpoint.dimensions import CheckpointLayout, DitLayout, SameLayout, TextEncoderLayout

StoredType = Literal["F32", "F16", "BF16"]
Shape = tuple[int, ...]

SEEDED_DEVIATION: Final = 0.83
"""The bottleneck's deviation in every seeded checkpoint; a training ends with another number."""
AUTOENCODER_PREFIX = "pretransform.model."
DIT_PREFIX = "model.model."
PROMPT_PREFIX = "conditioner.conditioners.prompt."
SECONDS_PREFIX = "conditioner.conditioners.seconds_total."
TEXT_ENCODER_PREFIX = "model.encoder."
TEXT_DECODER_PREFIX = "model.decoder."

_COUNTERS = re.compile(r"BOOL|[IU]\d+")
_TRAINING_ONLY = re.compile(
    # Averages that a training keeps beside the weights, under any of the usual names.
    r"(.+\.)?(\w+_)?ema(_\w+)?(\..+)?"
    # What else its checkpoint holds.
    r"|(discriminator|teacher_model|losses\w*|optimizer\w*|lr_scheduler\w*)(\..+)?"
)

DECODER_LAYERS = "decoder.layers.3"
ENCODER_LAYERS = "encoder.layers.0"


@dataclass(frozen=True, slots=True)
class Normal:
    """N(mean, deviation²)."""

    deviation: float
    mean: float = 0.0


@dataclass(frozen=True, slots=True)
class Matrix:
    """N(0, 1/fan_in) of a linear ([out, in]) or a convolution ([out, in, kernel])."""

    fan_in: int


@dataclass(frozen=True, slots=True)
class Embedding:
    """N(0, deviation²), one row per token."""

    deviation: float


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform in low..high."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Constant:
    """One value everywhere."""

    value: float


@dataclass(frozen=True, slots=True)
class RotaryFrequencies:
    """base^(-2i/2n) for n frequencies: not random, the network depends on the true values."""

    base: float = 10000.0


Distribution = Normal | Matrix | Embedding | Uniform | Constant | RotaryFrequencies

_VECTOR = Normal(0.1)
_GAMMA = Normal(0.2, mean=1.0)
_ALPHA = Uniform(0.5, 1.0)
_GAIN = Uniform(0.5, 1.5)
_LEARNED_TOKEN = Normal(0.3)
_MEMORY_TOKEN = Normal(0.5)
_EMBEDDING_STD, _EMBEDDING_WIDTH = 0.05, 768
"""Of the published width. The model multiplies its embedding by √width, so a narrower one has rows of the same size."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as published."""

    shape: Shape
    stored: StoredType
    distribution: Distribution

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.elements * (4 if self.stored == "F32" else 2)


def is_leftover(name: str, stored: str) -> bool:
    """Tell whether a tensor that no layout has is one that training leaves behind, not part of another model.

    These are integer and boolean buffers, averages of the weights (EMA) and what a training step needs. The averages
    are not used: a model that is exported from a training has them under the plain names, and where both stand in a
    file, the reference implementation takes the plain names and skips the rest.
    """
    return bool(_COUNTERS.fullmatch(stored) or _TRAINING_ONLY.fullmatch(name))


Named = Iterator[tuple[str, Shape, Distribution]]


def expected_tensors(layout: CheckpointLayout) -> dict[str, TensorSpec]:
    """Return every tensor of `model.safetensors`, sorted by name, as float32."""
    prefix = AUTOENCODER_PREFIX if layout.dit is not None else ""
    named = [(prefix + name, shape, fill) for name, shape, fill in _autoencoder(layout)]
    if layout.dit is not None:
        named += [(DIT_PREFIX + name, shape, fill) for name, shape, fill in _dit(layout.dit)]
    if layout.number_conditioner is not None:
        conditioner = layout.number_conditioner
        named += _linear(
            SECONDS_PREFIX + "embedder.embedding.1", conditioner.output_dim, conditioner.features, bias=True
        )
    if layout.text_encoder is not None:
        named.append((PROMPT_PREFIX + "padding_embedding", (layout.text_encoder.hidden_size,), _VECTOR))
    return {name: TensorSpec(shape, "F32", fill) for name, shape, fill in sorted(named, key=lambda item: item[0])}


def expected_text_encoder_tensors(text_encoder: TextEncoderLayout, *, decoder: bool = False) -> dict[str, TensorSpec]:
    """Return the tensors of the T5Gemma file, sorted, as bfloat16; those of its decoder are published, and not used."""
    named = list(_gemma_half("model.encoder", text_encoder, cross=False))
    if decoder:
        named += _gemma_half("model.decoder", text_encoder, cross=True)
    return {name: TensorSpec(shape, "BF16", fill) for name, shape, fill in sorted(named, key=lambda item: item[0])}


def _linear(name: str, outputs: int, inputs: int, *, bias: bool = False) -> Named:
    yield f"{name}.weight", (outputs, inputs), Matrix(inputs)
    if bias:
        yield f"{name}.bias", (outputs,), _VECTOR


def _perceptron(name: str, outputs: int, inputs: int, hidden: int, *, bias: bool) -> Named:
    yield from _linear(f"{name}.0", hidden, inputs, bias=bias)
    yield from _linear(f"{name}.2", outputs, hidden, bias=bias)


def _feed_forward(name: str, width: int, inner: int) -> Named:
    # SwiGLU: value and gate come out of one projection.
    yield from _linear(f"{name}.ff.0.proj", 2 * inner, width, bias=True)
    yield from _linear(f"{name}.ff.2", width, inner, bias=True)


def _dit(dit: DitLayout) -> Named:
    width = dit.embed_dim
    for name in ("preprocess_conv", "postprocess_conv"):
        yield f"{name}.weight", (dit.io_channels, dit.io_channels, 1), Matrix(dit.io_channels)
    yield from _perceptron("to_cond_embed", width, dit.cond_token_dim, width, bias=False)
    yield from _perceptron("to_global_embed", width, dit.global_cond_dim, width, bias=False)
    yield from _perceptron("to_timestep_embed", width, dit.timestep_features, width, bias=True)
    yield from _linear("transformer.project_in", width, dit.io_channels)
    yield from _linear("transformer.project_out", dit.io_channels, width)
    yield from _perceptron("transformer.global_cond_embedder", 6 * width, width, width, bias=True)
    if dit.num_memory_tokens:
        yield "transformer.memory_tokens", (dit.num_memory_tokens, width), _MEMORY_TOKEN
    # Partial RoPE turns half of each head, at least 32 values of it.
    rotated = max(dit.head_dim // 2, 32)
    yield "transformer.rotary_pos_emb.inv_freq", (rotated // 2,), RotaryFrequencies()
    for index in range(dit.depth):
        yield from _dit_block(f"transformer.layers.{index}", dit)


def _dit_block(name: str, dit: DitLayout) -> Named:
    width = dit.embed_dim
    # Differential attention has a second pair of queries and keys.
    pairs = 2 if dit.differential else 1
    for norm in ("pre_norm", "cross_attend_norm", "ff_norm"):
        yield f"{name}.{norm}.gamma", (width,), _GAMMA
    for attention in ("self_attn", "cross_attn"):
        for norm in ("q_norm", "k_norm"):
            yield f"{name}.{attention}.{norm}.gamma", (dit.head_dim,), _GAMMA
        yield from _linear(f"{name}.{attention}.to_out", width, width)
    yield from _linear(f"{name}.self_attn.to_qkv", (2 * pairs + 1) * width, width)
    yield from _linear(f"{name}.cross_attn.to_q", pairs * width, width)
    yield from _linear(f"{name}.cross_attn.to_kv", (pairs + 1) * width, width)
    yield from _feed_forward(f"{name}.ff", width, dit.ff_dim)
    yield from _perceptron(f"{name}.to_local_embed", width, dit.local_add_cond_dim, width, bias=True)
    yield f"{name}.to_scale_shift_gate", (6 * width,), _VECTOR


def _autoencoder(layout: CheckpointLayout) -> Named:
    auto = layout.autoencoder
    per_channel = (1, auto.latent_dim, 1)
    yield "bottleneck.scaling_factor", per_channel, _GAIN
    yield "bottleneck.bias", per_channel, _VECTOR
    yield "bottleneck.noise_scaling_factor", (1, 0, 1), _VECTOR
    yield "bottleneck.running_std", (1,), Constant(SEEDED_DEVIATION)
    yield from _same_layers(ENCODER_LAYERS, auto.encoder, auto.encoder.io_channels, auto.encoder.width)
    yield from _linear("encoder.layers.2", auto.latent_dim, auto.encoder.width, bias=True)
    yield from _linear("decoder.layers.1", auto.decoder.width, auto.latent_dim, bias=True)
    yield from _same_layers(DECODER_LAYERS, auto.decoder, auto.decoder.width, auto.decoder.io_channels)


def _same_layers(name: str, half: SameLayout, mapping_in: int, mapping_out: int) -> Named:
    yield f"{name}.new_tokens", (1, 1, half.width), _LEARNED_TOKEN
    yield f"{name}.mapping.weight_g", (mapping_out, 1, 1), _GAIN
    kernel = half.mapping_kernel
    yield f"{name}.mapping.weight_v", (mapping_out, mapping_in, kernel), Matrix(mapping_in * kernel)
    yield f"{name}.mapping.bias", (mapping_out,), _VECTOR
    for index in range(half.depth):
        yield from _same_block(f"{name}.transformers.{index}", half)


def _same_block(name: str, half: SameLayout) -> Named:
    width = half.width
    norms = {"pre_norm": width, "ff_norm": width, "self_attn.q_norm": half.head_dim, "self_attn.k_norm": half.head_dim}
    for norm, size in norms.items():
        yield f"{name}.{norm}.alpha", (1,), _ALPHA
        yield f"{name}.{norm}.gamma", (size,), _GAMMA
        yield f"{name}.{norm}.beta", (size,), _VECTOR
    rotated = max(half.head_dim // 2, 32)
    yield f"{name}.rope.inv_freq", (rotated // 2,), RotaryFrequencies()
    yield from _linear(f"{name}.self_attn.to_qkv", 5 * width, width)
    yield from _linear(f"{name}.self_attn.to_out", width, width)
    yield from _feed_forward(f"{name}.ff", width, int(width * half.ff_mult))


def _gemma_half(name: str, text: TextEncoderLayout, *, cross: bool) -> Named:
    embedding = Embedding(_EMBEDDING_STD * math.sqrt(_EMBEDDING_WIDTH / text.hidden_size))
    yield f"{name}.embed_tokens.weight", (text.vocab_size, text.hidden_size), embedding
    yield f"{name}.norm.weight", (text.hidden_size,), _VECTOR
    attentions = ("self_attn", "cross_attn") if cross else ("self_attn",)
    for index in range(text.num_layers):
        layer = f"{name}.layers.{index}"
        for attention in attentions:
            yield from _gemma_attention(f"{layer}.{attention}", text)
        for norm in (*attentions, "feedforward"):
            for side in ("pre", "post"):
                yield f"{layer}.{side}_{norm}_layernorm.weight", (text.hidden_size,), _VECTOR
        yield from _linear(f"{layer}.mlp.gate_proj", text.intermediate_size, text.hidden_size)
        yield from _linear(f"{layer}.mlp.up_proj", text.intermediate_size, text.hidden_size)
        yield from _linear(f"{layer}.mlp.down_proj", text.hidden_size, text.intermediate_size)


def _gemma_attention(name: str, text: TextEncoderLayout) -> Named:
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    yield from _linear(f"{name}.q_proj", queries, text.hidden_size)
    yield from _linear(f"{name}.k_proj", keys, text.hidden_size)
    yield from _linear(f"{name}.v_proj", keys, text.hidden_size)
    yield from _linear(f"{name}.o_proj", text.hidden_size, queries)
