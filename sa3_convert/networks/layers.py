"""The pieces that several networks share, written so that they export to operators which every backend gets right.

No integer or boolean arithmetic: masks are additive floats, lengths only ever become a range of floats.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -1e4
"""What is added to the logit of a key that must not be seen.

Every logit here is bounded far below it (the text encoder caps at ±50, the others normalise q and k), so in float32 and
in float16 the weight of a masked key underflows to exactly zero; float16 reaches −65504, so nothing turns infinite.
Infinity itself would make a row without any key NaN.
"""


class Derived(nn.Module):
    """A module with constants that follow from its parameters, so that graphs hold them ready-made."""

    def derive(self) -> None:
        """Compute the constants; called once, after the parameters are loaded."""
        raise NotImplementedError


class RmsNorm(nn.Module):
    """x / rms(x) · gamma over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x`, any shape [..., width]."""
        return rms_normalised(x, self.eps) * self.gamma


def rms_normalised(x: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) over the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps)


class DynamicTanh(nn.Module):
    """γ·tanh(α·x) + β, SAME's replacement for a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))
        self.gamma = nn.Parameter(torch.empty(width))
        self.beta = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the squashed `x`, any shape [..., width]."""
        return torch.tanh(x * self.alpha) * self.gamma + self.beta


class ExpoFourierFeatures(nn.Module):
    """cos and sin of 2π·f·t at log-spaced frequencies f = 0.5 … 10000.

    The highest phases reach 6·10⁴ rad, where neighbouring float32 numbers lie 4·10⁻³ rad apart, so the features carry
    phase noise: up to 6·10⁻³ against exact arithmetic, 68 dB over all of them. Any other order of the multiplications
    has other noise: with f·2π folded into one constant the golden DiT agrees to 2.8·10⁻⁴ of its peak (73 dB) instead of
    4·10⁻⁷ (128 dB). The order here, (t·f)·2π, is the reference's; up to the rounding of sin and cos the result is its
    own. Below float32 the features are meaningless.
    """

    frequencies: Tensor

    def __init__(self, features: int, lowest: float = 0.5, highest: float = 10000.0) -> None:
        super().__init__()
        ramp = torch.linspace(0, 1, features // 2, dtype=torch.float32, device="cpu")
        low, high = math.log(lowest), math.log(highest)
        self.register_buffer("frequencies", torch.exp(ramp * (high - low) + low), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Return [B, features] for `t` [B, 1]."""
        phase = t * self.frequencies * (2 * math.pi)
        return torch.cat((torch.cos(phase), torch.sin(phase)), dim=-1)


class GatedProjection(nn.Module):
    """One linear that yields value and gate, in this order: value · activation(gate)."""

    def __init__(self, width: int, inner: int, *, sinusoidal: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)
        self.sinusoidal = sinusoidal

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., inner] for `x` [..., width]."""
        projected: Tensor = self.proj(x)
        value, gate = projected.chunk(2, dim=-1)
        # The reference writes π with twelve digits, which is float32's π all the same.
        return value * (torch.sin(gate * math.pi) if self.sinusoidal else F.silu(gate))


class FeedForward(nn.Module):
    """Gated feed-forward; SiLU, or sin(π·gate) in the late blocks of SAME-L's decoder."""

    def __init__(self, width: int, inner: int, *, sinusoidal: bool = False) -> None:
        super().__init__()
        # The empty place keeps the checkpoint's numbering of the parameters.
        self.ff = nn.Sequential(
            GatedProjection(width, inner, sinusoidal=sinusoidal), nn.Identity(), nn.Linear(inner, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., width] for `x` [..., width]."""
        output: Tensor = self.ff(x)
        return output


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2·F channels of `x` [..., N, D] by the angles whose `cos` and `sin` [N, F] are given.

    Channel i pairs with channel i + F ("rotate half"); what lies beyond 2·F passes through.
    """
    pairs = cos.shape[-1]
    rest = x.shape[-1] - 2 * pairs
    first, second, *beyond = torch.split(x, [pairs, pairs, rest] if rest else [pairs, pairs], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, *beyond), dim=-1)


def rotary_tables(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin [N, F] of the rotary angles of `positions` [N] at `inv_freq` [F]."""
    phase = positions[:, None] * inv_freq
    return torch.cos(phase), torch.sin(phase)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, cap: float | None = None) -> Tensor:
    """Return softmax attention [B, H, N, D] of scaled queries [B, H, N, D], keys and values [B, H, M, D].

    Logits are capped to cap·tanh(logits / cap) before the bias, broadcast to [B, H, N, M], is added to them.
    """
    logits = q @ k.transpose(-1, -2)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    if bias is not None:
        logits = logits + bias
    return torch.softmax(logits, dim=-1) @ v
