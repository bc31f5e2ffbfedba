"""The shared pieces against independent formulas."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sa3_convert.networks.autoencoder import WeightNormConv
from sa3_convert.networks.layers import (
    MASKED,
    ExpoFourierFeatures,
    FeedForward,
    GatedProjection,
    RmsNorm,
    attend,
    rotary_tables,
    rotate,
)

Noise = Callable[..., Tensor]


def test_rms_norm_equals_torchs(noise: Noise) -> None:
    norm = RmsNorm(16, eps=1e-3)
    norm.gamma = nn.Parameter(noise(16))
    x = noise(2, 5, 16)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.gamma, eps=1e-3))


def test_attention_equals_torchs(noise: Noise) -> None:
    q, k, v, bias = noise(2, 3, 5, 8), noise(2, 3, 7, 8), noise(2, 3, 7, 8), noise(5, 7)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    torch.testing.assert_close(attend(q, k, v, bias), expected)


def test_the_cap_bounds_the_logits_before_the_mask(noise: Noise) -> None:
    q, k, v, bias = 100 * noise(1, 1, 3, 8), noise(1, 1, 4, 8), noise(1, 1, 4, 8), noise(3, 4)
    logits = 5 * torch.tanh(q @ k.transpose(-1, -2) / 5) + bias
    torch.testing.assert_close(attend(q, k, v, bias, cap=5.0), torch.softmax(logits, -1) @ v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_masked_key_has_a_weight_of_exactly_zero(dtype: torch.dtype) -> None:
    # The seen key is as low and the masked one as high as the text encoder's cap of 50 allows.
    logits = torch.tensor([-50.0, 50.0], dtype=dtype) + torch.tensor([0.0, MASKED], dtype=dtype)
    assert torch.softmax(logits, -1).tolist() == [1.0, 0.0]


def test_a_row_of_masked_keys_only_stays_finite(noise: Noise) -> None:
    bias = torch.full((1, 4), MASKED)
    assert attend(noise(1, 1, 3, 8), noise(1, 1, 4, 8), noise(1, 1, 4, 8), bias).isfinite().all()


@settings(deadline=None)
@given(shift=st.integers(-1000, 1000), seed=st.integers(0, 2**31))
def test_rotary_products_depend_on_differences_of_positions_only(shift: int, seed: int) -> None:
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inv_freq = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)

    def product(query_at: int, key_at: int) -> Tensor:
        tables = rotary_tables(torch.tensor([query_at, key_at], dtype=torch.float64), inv_freq)
        cos, sin = (table[:, None] for table in tables)
        return (rotate(q, cos[0], sin[0]) * rotate(k, cos[1], sin[1])).sum()

    torch.testing.assert_close(product(5, 12), product(5 + shift, 12 + shift), rtol=1e-9, atol=1e-9)


def test_channels_beyond_the_rotated_ones_pass_through(noise: Noise) -> None:
    x, tables = noise(1, 3, 8), rotary_tables(torch.arange(3.0), torch.tensor([1.0, 0.5]))
    rotated = rotate(x, *tables)
    assert torch.equal(rotated[..., 4:], x[..., 4:])
    assert not torch.equal(rotated[:, 1:, :4], x[:, 1:, :4])


def test_fourier_features_are_those_of_the_reference_to_the_last_bit() -> None:
    t = torch.tensor([[0.0], [1 / 3], [0.7310586], [1.0]])
    freqs = torch.exp(torch.linspace(0, 1, 128) * (math.log(10000.0) - math.log(0.5)) + math.log(0.5))
    phase = t * freqs * 2 * math.pi
    assert torch.equal(ExpoFourierFeatures(256)(t), torch.cat((phase.cos(), phase.sin()), dim=-1))


def test_the_phase_noise_of_the_fourier_features_is_what_float32_leaves() -> None:
    t = torch.rand(256, 1, generator=torch.Generator().manual_seed(0))
    features = ExpoFourierFeatures(256)
    exact = t.double() * features.frequencies.double() * (2 * math.pi)
    error = (features(t).double() - torch.cat((exact.cos(), exact.sin()), dim=-1)).abs().max()
    # Two roundings of half a unit in the last place at 2^15…2^16 rad, and that of float32's π.
    assert 1e-3 < error < 1.2e-2


def test_the_sinusoidal_gate_replaces_silu_with_the_sine_of_pi_times_the_gate(noise: Noise) -> None:
    silu, sine = FeedForward(4, 6), FeedForward(4, 6, sinusoidal=True)
    sine.load_state_dict(silu.state_dict())
    x = noise(2, 4)
    first, _, out = silu.ff
    assert isinstance(first, GatedProjection)
    value, gate = first.proj(x).chunk(2, dim=-1)
    torch.testing.assert_close(silu(x), out(value * F.silu(gate)))
    torch.testing.assert_close(sine(x), out(value * torch.sin(torch.pi * gate)))


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_weight_normalised_convolution_equals_torchs(kernel: int, noise: Noise) -> None:
    expected = weight_norm(nn.Conv1d(6, 4, kernel, padding="same"))
    conv = WeightNormConv(6, 4, kernel)
    g, v = 1 + noise(4, 1, 1), noise(4, 6, kernel)
    expected.parametrizations.weight.original0.data, expected.parametrizations.weight.original1.data = g, v
    conv.load_state_dict({"weight_g": g, "weight_v": v, "bias": expected.bias.data})
    x = noise(2, 6, 9)
    torch.testing.assert_close(conv(x), expected(x))
