"""What the DiT is told: T5Gemma's encoder with its learned padding, and the number of seconds as one token."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_convert.checkpoint.dimensions import NumberConditionerLayout, TextEncoderLayout
from sa3_convert.networks.layers import (
    MASKED,
    Derived,
    ExpoFourierFeatures,
    attend,
    rms_normalised,
    rotary_tables,
    rotate,
)


class _GemmaNorm(Derived):
    """RMS norm that scales by 1 + weight, which is ready-made but where the weight is still learned."""

    scale: Tensor

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.register_buffer("scale", torch.empty(width), persistent=False)
        self.eps = eps

    def derive(self) -> None:
        self.scale = 1 + self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalised(x, self.eps) * (1 + self.weight if self.training else self.scale)


class _SelfAttention(nn.Module):
    attend = staticmethod(attend)

    def __init__(self, layout: TextEncoderLayout) -> None:
        super().__init__()
        self.head_dim = layout.head_dim
        self.heads_per_key = layout.num_heads // layout.num_kv_heads
        self.scale = layout.query_pre_attn_scalar**-0.5
        self.cap = layout.attn_logit_softcap
        width = layout.hidden_size
        self.q_proj = nn.Linear(width, layout.num_heads * layout.head_dim, bias=False)
        self.k_proj = nn.Linear(width, layout.num_kv_heads * layout.head_dim, bias=False)
        self.v_proj = nn.Linear(width, layout.num_kv_heads * layout.head_dim, bias=False)
        self.o_proj = nn.Linear(layout.num_heads * layout.head_dim, width, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        q = rotate(self._heads(self.q_proj(x)), *rope) * self.scale
        k = rotate(self._heads(self.k_proj(x)), *rope)
        v = self._heads(self.v_proj(x))
        if self.heads_per_key > 1:
            k, v = (shared.repeat_interleave(self.heads_per_key, dim=1) for shared in (k, v))
        output: Tensor = self.o_proj(self.attend(q, k, v, bias, cap=self.cap).transpose(1, 2).flatten(2))
        return output


class _Mlp(nn.Module):
    def __init__(self, layout: TextEncoderLayout) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(layout.hidden_size, layout.intermediate_size, bias=False)
        self.up_proj = nn.Linear(layout.hidden_size, layout.intermediate_size, bias=False)
        self.down_proj = nn.Linear(layout.intermediate_size, layout.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return output


class _Layer(nn.Module):
    """Attention and MLP, each between two norms."""

    def __init__(self, layout: TextEncoderLayout) -> None:
        super().__init__()
        width, eps = layout.hidden_size, layout.rms_norm_eps
        self.self_attn = _SelfAttention(layout)
        self.mlp = _Mlp(layout)
        self.pre_self_attn_layernorm = _GemmaNorm(width, eps)
        self.post_self_attn_layernorm = _GemmaNorm(width, eps)
        self.pre_feedforward_layernorm = _GemmaNorm(width, eps)
        self.post_feedforward_layernorm = _GemmaNorm(width, eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        x = x + self.post_self_attn_layernorm(self.self_attn(self.pre_self_attn_layernorm(x), rope, bias))
        output: Tensor = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return output


class TextEncoder(nn.Module):
    """Token ids to conditioning tokens; padded positions come out as the learned padding embedding.

    Source of the arithmetic: the published T5Gemma encoder in `transformers`. Its sliding windows are wider than any
    prompt here, so every layer is full attention.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, layout: TextEncoderLayout) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(layout.vocab_size, layout.hidden_size)
        self.layers = nn.ModuleList(_Layer(layout) for _ in range(layout.num_layers))
        self.norm = _GemmaNorm(layout.hidden_size, layout.rms_norm_eps)
        self.padding_embedding = nn.Parameter(torch.empty(layout.hidden_size))
        self.embedding_scale = math.sqrt(layout.hidden_size)
        exponents = torch.arange(0, layout.head_dim, 2, dtype=torch.float32, device="cpu") / layout.head_dim
        positions = torch.arange(layout.max_length, dtype=torch.float32, device="cpu")
        cos, sin = rotary_tables(positions, 1.0 / layout.rope_theta**exponents)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden state [B, N, width] float32; both inputs [B, N] int32, the mask 1 for a token."""
        return self.encode(self.embed_tokens(input_ids), attention_mask.to(torch.float32))

    def encode(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Return the last hidden state for rows of the embedding table [B, N, width] and a float mask [B, N]."""
        x = embeddings * self.embedding_scale
        # Padded queries see everything: their rows are replaced below, and no row is ever left without a key.
        bias = (mask[:, None, :, None] * (1 - mask)[:, None, None, :]) * MASKED
        # Of a prompt without padding, as calibration has them, N is its own length.
        rope = (self.cos[: x.shape[1]], self.sin[: x.shape[1]])
        for layer in self.layers:
            x = layer(x, rope, bias)
        valid = mask[:, :, None]
        output: Tensor = self.norm(x) * valid + self.padding_embedding * (1 - valid)
        return output


class _Embedder(nn.Module):
    def __init__(self, layout: NumberConditionerLayout) -> None:
        super().__init__()
        self.embedding = nn.Sequential(
            ExpoFourierFeatures(layout.features), nn.Linear(layout.features, layout.output_dim)
        )

    def forward(self, normalised: Tensor) -> Tensor:
        output: Tensor = self.embedding(normalised)
        return output


class NumberConditioner(nn.Module):
    """Clamp to the range, bring to 0 … 1, Fourier features, one linear."""

    def __init__(self, layout: NumberConditionerLayout) -> None:
        super().__init__()
        self.low, self.high = layout.min_value, layout.max_value
        self.embedder = _Embedder(layout)

    def forward(self, seconds: Tensor) -> Tensor:
        """Return the embedding [B, 1, output_dim] float32 of `seconds` [B] float32."""
        offset = seconds.clamp(self.low, self.high) - self.low
        # Converters turn a division by a constant into a product with its reciprocal. That rounds differently, and the
        # features magnify the last bit to 4·10⁻³ rad. This divisor is the same number, but no constant.
        span = offset.clamp(min=self.high - self.low)
        output: Tensor = self.embedder((offset / span)[:, None]).unsqueeze(1)
        return output
