"""The diffusion transformer: velocity of the latents at a time t, plain (small) and differential (medium)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_convert.checkpoint.dimensions import DitLayout
from sa3_convert.networks.layers import MASKED, ExpoFourierFeatures, FeedForward, RmsNorm, attend, rotary_tables, rotate

Padding = Literal["key_mask", "value_zeroing"]
"""What `padding_mask` does in self-attention.

`key_mask`: padded keys are not seen, as with flash attention and in training. `value_zeroing`: their values are zero
but they keep their softmax weight, as in the reference without flash attention. With a mask of ones they are the same.
"""

CONDITIONING = frozenset({"cross_attn_cond", "global_embed", "local_add_cond"})
"""Inputs that stay the same in all steps of a generation."""
CONDITIONED = frozenset({"to_cond_embed", "to_global_embed", "to_kv", "to_local_embed"})
"""Modules that see nothing but these."""

_BLOCK_EPS = 1e-5
_QK_EPS = 1e-6


class _Attention(nn.Module):
    """What self- and cross-attention share: q/k norms, scaling, the difference of two attentions, the output."""

    attend = staticmethod(attend)

    def __init__(self, layout: DitLayout) -> None:
        super().__init__()
        self.head_dim = layout.head_dim
        self.scale = layout.head_dim**-0.5
        self.q_norm = RmsNorm(layout.head_dim, _QK_EPS)
        self.k_norm = RmsNorm(layout.head_dim, _QK_EPS)
        self.to_out = nn.Linear(layout.embed_dim, layout.embed_dim, bias=False)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Cut [B, N, parts·width] into `parts` tensors [B, heads, N, head_dim]."""
        return tuple(
            part.view(part.shape[0], -1, part.shape[2] // self.head_dim, self.head_dim).transpose(1, 2)
            for part in x.chunk(parts, dim=-1)
        )

    def _merged(self, x: Tensor) -> Tensor:
        """Join the heads of [B, heads, N, head_dim] and project to [B, N, width]."""
        output: Tensor = self.to_out(x.transpose(1, 2).flatten(2))
        return output


class SelfAttention(_Attention):
    """Rotary self-attention; in the differential form the output is the difference of two attentions over one v."""

    def __init__(self, layout: DitLayout, padding: Padding) -> None:
        super().__init__(layout)
        self.parts = 5 if layout.differential else 3
        self.padding = padding
        self.to_qkv = nn.Linear(layout.embed_dim, self.parts * layout.embed_dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return [B, N, width] for x of that shape, rotary cos and sin [N, F].

        `mask` is a logit bias [B, 1, 1, N] with a key mask, a factor [B, 1, N, 1] with value zeroing.
        """
        q, k, v, *differential = self._heads(self.to_qkv(x), self.parts)
        bias = None
        if self.padding == "value_zeroing":
            v = v * mask
        else:
            bias = mask

        def attention(query: Tensor, key: Tensor) -> Tensor:
            query = rotate(self.q_norm(query), cos, sin) * self.scale
            return self.attend(query, rotate(self.k_norm(key), cos, sin), v, bias)

        attended = attention(q, k)
        if differential:
            attended = attended - attention(*differential)
        return self._merged(attended)


class CrossAttention(_Attention):
    """Attention to the conditioning tokens, without positions and without a mask."""

    def __init__(self, layout: DitLayout) -> None:
        super().__init__(layout)
        self.differential = layout.differential
        width = layout.embed_dim
        self.to_q = nn.Linear(width, (2 if layout.differential else 1) * width, bias=False)
        self.to_kv = nn.Linear(width, (3 if layout.differential else 2) * width, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return [B, N, width] for `x` [B, N, width] and `context` [B, M, width]."""
        queries = self._heads(self.to_q(x), 2 if self.differential else 1)
        *keys, v = self._heads(self.to_kv(context), 3 if self.differential else 2)
        pairs = zip(queries, keys, strict=True)
        attended = [self.attend(self.q_norm(q) * self.scale, self.k_norm(k), v) for q, k in pairs]
        return self._merged(attended[0] - attended[1] if self.differential else attended[0])


class Block(nn.Module):
    """Self-attention and feed-forward under adaptive scale, shift and gate; cross-attention and local conditioning."""

    def __init__(self, layout: DitLayout, padding: Padding) -> None:
        super().__init__()
        width = layout.embed_dim
        self.pre_norm = RmsNorm(width, _BLOCK_EPS)
        self.self_attn = SelfAttention(layout, padding)
        self.cross_attend_norm = RmsNorm(width, _BLOCK_EPS)
        self.cross_attn = CrossAttention(layout)
        self.ff_norm = RmsNorm(width, _BLOCK_EPS)
        self.ff = FeedForward(width, layout.ff_dim)
        self.to_scale_shift_gate = nn.Parameter(torch.empty(6 * width))
        self.to_local_embed = nn.Sequential(
            nn.Linear(layout.local_add_cond_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.memory = layout.num_memory_tokens

    def forward(
        self, x: Tensor, context: Tensor, modulation: Tensor, local: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """Return [B, N, width] for x of that shape, memory tokens first, and context [B, M, width].

        `modulation` [B, 1, 6·width] is what all blocks share of scale, shift and gate; local is
        [B, T, local_add_cond_dim], cos and sin [N, F] each, and the mask that of `SelfAttention`.
        """
        scale, shift, gate, ff_scale, ff_shift, ff_gate = (modulation + self.to_scale_shift_gate).chunk(6, dim=-1)
        attended = self.self_attn(self.pre_norm(x) * (scale + 1) + shift, *rope, mask)
        x = x + attended * torch.sigmoid(1 - gate)
        x = x + self.cross_attn(self.cross_attend_norm(x), context)
        x = x + F.pad(self.to_local_embed(local), (0, 0, self.memory, 0))
        forwarded = self.ff(self.ff_norm(x) * (ff_scale + 1) + ff_shift)
        output: Tensor = x + forwarded * torch.sigmoid(1 - ff_gate)
        return output


class RotaryPositions(nn.Module):
    """Cosines and sines of position · inv_freq for a number of memory tokens followed by T latents."""

    inv_freq: Tensor
    memory_positions: Tensor

    def __init__(self, layout: DitLayout) -> None:
        super().__init__()
        self.memory = layout.num_memory_tokens
        self.register_buffer("inv_freq", torch.empty(max(layout.head_dim // 2, 32) // 2))
        memory = torch.arange(self.memory, dtype=torch.float32, device="cpu")
        self.register_buffer("memory_positions", memory, persistent=False)

    def forward(self, latents: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [memory + latents, F] each."""
        positions = torch.arange(latents, dtype=torch.float32, device=self.inv_freq.device) + self.memory
        return rotary_tables(torch.cat((self.memory_positions, positions)), self.inv_freq)


class Transformer(nn.Module):
    """Memory tokens and latents through the blocks."""

    def __init__(self, layout: DitLayout, padding: Padding) -> None:
        super().__init__()
        width = layout.embed_dim
        self.padding = padding
        self.memory = layout.num_memory_tokens
        self.project_in = nn.Linear(layout.io_channels, width, bias=False)
        self.project_out = nn.Linear(width, layout.io_channels, bias=False)
        self.rotary_pos_emb = RotaryPositions(layout)
        if self.memory:
            self.memory_tokens = nn.Parameter(torch.empty(self.memory, width))
        self.global_cond_embedder = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 6 * width))
        self.layers = nn.ModuleList(Block(layout, padding) for _ in range(layout.depth))

    def forward(self, x: Tensor, context: Tensor, cond: Tensor, local: Tensor, padding_mask: Tensor) -> Tensor:
        """Return [B, T, io_channels] for x of that shape, context [B, M, width] and local [B, T, local_add_cond_dim].

        `cond` [B, width] is the global conditioning with the time in it; the padding mask [B, T] is 1 where valid.
        """
        rope = self.rotary_pos_emb(x.shape[1])
        mask = self._mask(padding_mask)
        modulation = self.global_cond_embedder(cond).unsqueeze(1)
        x = self.project_in(x)
        if self.memory:
            x = torch.cat((self.memory_tokens.unsqueeze(0).expand(x.shape[0], -1, -1), x), dim=1)
        for layer in self.layers:
            x = layer(x, context, modulation, local, rope, mask)
        output: Tensor = self.project_out(x[:, self.memory :])
        return output

    def _mask(self, padding_mask: Tensor) -> Tensor:
        """Extend the mask over the memory tokens, which are always valid, and shape it for the attention."""
        if self.padding == "value_zeroing":
            return F.pad(padding_mask, (self.memory, 0), value=1.0)[:, None, :, None]
        return F.pad((1 - padding_mask) * MASKED, (self.memory, 0))[:, None, None, :]


class Dit(nn.Module):
    """Diffusion transformer.

    Source of the arithmetic: the published Stable Audio 3 reference. Any batch size and any T ≥ 1.
    """

    def __init__(self, layout: DitLayout, padding: Padding = "key_mask") -> None:
        super().__init__()
        width, channels = layout.embed_dim, layout.io_channels
        self.timestep_features = ExpoFourierFeatures(layout.timestep_features)
        self.to_timestep_embed = nn.Sequential(
            nn.Linear(layout.timestep_features, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.to_cond_embed = nn.Sequential(
            nn.Linear(layout.cond_token_dim, width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False)
        )
        self.to_global_embed = nn.Sequential(
            nn.Linear(layout.global_cond_dim, width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False)
        )
        self.transformer = Transformer(layout, padding)
        self.preprocess_conv = nn.Conv1d(channels, channels, 1, bias=False)
        self.postprocess_conv = nn.Conv1d(channels, channels, 1, bias=False)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cross_attn_cond: Tensor,
        global_embed: Tensor,
        local_add_cond: Tensor,
        padding_mask: Tensor,
    ) -> Tensor:
        """Return the velocity [B, C, T] float32.

        Args:
            x: noisy latents [B, C, T] float32.
            t: time [B] float32, 0 (clean) to 1 (noise).
            cross_attn_cond: prompt and duration tokens [B, M, cond_token_dim] float32.
            global_embed: duration embedding [B, global_cond_dim] float32.
            local_add_cond: inpainting mask and masked latents [B, C + 1, T] float32.
            padding_mask: [B, T] float32, 1 = valid. What stands at invalid positions of the output is undefined.

        """
        context = self.to_cond_embed(cross_attn_cond)
        time = self.to_timestep_embed(self.timestep_features(t[:, None]))
        cond = self.to_global_embed(global_embed) + time
        x = (x + self.preprocess_conv(x)).transpose(1, 2)
        x = self.transformer(x, context, cond, local_add_cond.transpose(1, 2), padding_mask).transpose(1, 2)
        output: Tensor = x + self.postprocess_conv(x)
        return output
