"""SAME's encoder (patches to latents) and decoder (latents to samples), with all that the converted models include."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_convert.checkpoint.dimensions import AutoencoderLayout, SameLayout
from sa3_convert.networks.layers import MASKED, Derived, DynamicTanh, FeedForward, attend, rotary_tables, rotate


class WeightNormConv(nn.Module):
    """1-D convolution with weight g·v/‖v‖, the norm over each output channel; the length stays.

    The norm is spelled as Mul, ReduceSum, Sqrt: backends reduce ReduceL2 over the wrong axes.
    """

    def __init__(self, channels: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(outputs, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(outputs, channels, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.padding = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, outputs, N] for `x` [B, channels, N]."""
        norm = torch.sqrt((self.weight_v * self.weight_v).sum(dim=(1, 2), keepdim=True))
        return F.conv1d(x, self.weight_v * (self.weight_g / norm), self.bias, padding=self.padding)

    def fused(self) -> nn.Conv1d:
        """Return the same convolution with its weight computed once."""
        outputs, channels, kernel = self.weight_v.shape
        conv = nn.Conv1d(channels, outputs, kernel, padding=self.padding, device="meta")
        norm = torch.sqrt((self.weight_v * self.weight_v).sum(dim=(1, 2), keepdim=True))
        tensors = self.weight_v * (self.weight_g / norm), self.bias
        conv.weight, conv.bias = (nn.Parameter(x, requires_grad=False) for x in tensors)
        return conv


def fuse_weight_norms(network: nn.Module) -> None:
    """Replace convolutions with a weight norm by plain ones, in place."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, WeightNormConv):
                setattr(module, name, child.fused())


class _Attention(nn.Module):
    """Differential attention: the difference of two attentions over one v."""

    attend = staticmethod(attend)

    def __init__(self, layout: SameLayout) -> None:
        super().__init__()
        self.head_dim = layout.head_dim
        self.scale = layout.head_dim**-0.5
        self.reach = layout.sliding_window or (0, 0)
        self.to_qkv = nn.Linear(layout.width, 5 * layout.width, bias=False)
        self.to_out = nn.Linear(layout.width, layout.width, bias=False)
        self.q_norm = DynamicTanh(layout.head_dim)
        self.k_norm = DynamicTanh(layout.head_dim)

    def forward(
        self, x: Tensor, query_rope: tuple[Tensor, Tensor], key_rope: tuple[Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        """Return [S, N, width] for `x` [S, N, width], S windows or groups; a row sees its neighbours within reach."""
        q, k, v, q_diff, k_diff = (
            part.view(-1, part.shape[1], part.shape[2] // self.head_dim, self.head_dim)
            for part in self.to_qkv(x).chunk(5, dim=-1)
        )
        v = self._with_neighbours(v).transpose(1, 2)

        def attention(query: Tensor, key: Tensor) -> Tensor:
            query = rotate(self.q_norm(query).transpose(1, 2), *query_rope) * self.scale
            key = rotate(self._with_neighbours(self.k_norm(key)).transpose(1, 2), *key_rope)
            return self.attend(query, key, v, bias)

        attended = attention(q, k) - attention(q_diff, k_diff)
        output: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return output

    def _with_neighbours(self, x: Tensor) -> Tensor:
        """Put the tokens of the groups before and after beside each group's own: [S, N, …] → [S, (1 + reach)·N, …].

        The groups at the ends get zeros, which the bias hides.
        """
        before, after = self.reach
        if before + after == 0:
            return x
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, before, after))
        return torch.cat([padded[shift] for shift in shifts(self.reach)], dim=1)


def shifts(reach: tuple[int, int]) -> list[slice]:
    """Return the slices that take each neighbour, first to last, from groups padded by `reach` at both ends."""
    width = sum(reach)
    return [slice(start, start - width if start < width else None) for start in range(width + 1)]


class Block(Derived):
    """Attention and feed-forward behind DynamicTanh norms, with rotary positions inside a window or a band.

    Rotary attention depends on differences of positions only, so the positions of a band count from the first token in
    reach: the tables are small constants, and long sequences lose nothing to float32's rounding of large angles.
    """

    query_cos: Tensor
    query_sin: Tensor
    key_cos: Tensor
    key_sin: Tensor

    def __init__(self, layout: SameLayout, *, tokens: int, sinusoidal: bool) -> None:
        super().__init__()
        self.pre_norm = DynamicTanh(layout.width)
        self.self_attn = _Attention(layout)
        self.ff_norm = DynamicTanh(layout.width)
        self.ff = FeedForward(layout.width, int(layout.width * layout.ff_mult), sinusoidal=sinusoidal)
        self.rope = nn.Module()
        self.rope.register_buffer("inv_freq", torch.empty(layout.head_dim // 4))
        before, after = layout.sliding_window or (0, 0)
        self.tokens, self.first, self.keys = tokens, before * tokens, (before + 1 + after) * tokens
        for name, count in (("query", self.tokens), ("key", self.keys)):
            for table in ("cos", "sin"):
                empty = torch.empty(count, layout.head_dim // 4)
                self.register_buffer(f"{name}_{table}", empty, persistent=False)

    def derive(self) -> None:
        """Compute the rotary tables of queries and keys."""
        inv_freq = self.rope.get_buffer("inv_freq")
        positions = torch.arange(self.keys, dtype=torch.float32, device=inv_freq.device)
        self.key_cos, self.key_sin = rotary_tables(positions, inv_freq)
        own = positions[self.first : self.first + self.tokens]
        self.query_cos, self.query_sin = rotary_tables(own, inv_freq)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return [S, N, width] for `x` [S, N, width] and the logit bias of a band."""
        queries, keys = (self.query_cos, self.query_sin), (self.key_cos, self.key_sin)
        x = x + self.self_attn(self.pre_norm(x), queries, keys, bias)
        output: Tensor = x + self.ff(self.ff_norm(x))
        return output


class _Bands(nn.Module):
    """The logit bias of a sliding window: the band itself, and nothing beyond the ends of the sequence."""

    band: Tensor
    slots: Tensor

    def __init__(self, reach: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.reach = reach
        count = sum(reach) + 1
        distance = torch.arange(count * tokens, device="cpu")[None, :] - torch.arange(tokens, device="cpu")[:, None]
        outside = (distance < 0) | (distance > sum(reach) * tokens)
        self.register_buffer("band", outside.to(torch.float32) * MASKED, persistent=False)
        slots = torch.eye(count, device="cpu").repeat_interleave(tokens, dim=1)
        self.register_buffer("slots", slots, persistent=False)

    def forward(self, groups: Tensor, batch: int) -> Tensor:
        """Return [S, 1, N, (1 + reach)·N] for `groups` [S, N, width], S = `batch` · latents."""
        inside = torch.zeros_like(groups[:, :1, :1]).view(batch, -1)
        beyond = F.pad(inside, self.reach, value=MASKED)
        bias = self.band
        for neighbour, shift in enumerate(shifts(self.reach)):
            if neighbour != self.reach[0]:
                bias = bias + beyond[:, shift].contiguous().view(-1, 1, 1, 1) * self.slots[neighbour]
        return bias


class Resampler(nn.Module):
    """The weights between patches and latents: mapping conv, the learned token, the blocks over the groups."""

    def __init__(self, layout: SameLayout, channels: int, outputs: int) -> None:
        super().__init__()
        self.group, self.width = layout.group, layout.width
        self.mapping = WeightNormConv(channels, outputs, layout.mapping_kernel)
        self.new_tokens = nn.Parameter(torch.empty(1, 1, layout.width))
        self.window = None if layout.chunk_size is None else layout.chunk_size // layout.stride * layout.group
        self.bands = None if layout.sliding_window is None else _Bands(layout.sliding_window, layout.group)
        self.transformers = nn.ModuleList(
            Block(layout, tokens=self.window or layout.group, sinusoidal=index >= layout.sinusoidal_from)
            for index in range(layout.depth)
        )

    def transform(self, groups: Tensor, batch: int) -> Tensor:
        """Run the blocks over `groups` [S, N, width], S = `batch` · latents; the shape stays."""
        if self.window is None:
            assert self.bands is not None
            bias = self.bands(groups, batch)
            for block in self.transformers:
                groups = block(groups, bias)
            return groups
        split = len(self.transformers) // 2
        shift = self.window // 2
        x = groups.view(-1, self.window, self.width)
        for block in self.transformers[:split]:
            x = block(x, None)
        x = x.view(batch, -1, self.width)
        # The shifted windows at the ends are completed by repeating the first and the last half window.
        x = torch.cat((x[:, :shift], x, x[:, -shift:]), dim=1).view(-1, self.window, self.width)
        for block in self.transformers[split:]:
            x = block(x, None)
        x = x.view(batch, -1, self.width)[:, shift:-shift]
        return x.contiguous().view(-1, self.group, self.width)


class Encoder(nn.Module):
    """Patched audio to latents before the bottleneck.

    Source of the arithmetic: the published Stable Audio 3 reference.
    """

    def __init__(self, layout: AutoencoderLayout) -> None:
        super().__init__()
        same = layout.encoder
        self.stride, self.width, self.multiple = same.stride, same.width, latents_multiple(same)
        # The empty place keeps the checkpoint's numbering of the parameters; so does the decoder.
        self.layers = nn.ModuleList(
            (Resampler(same, same.io_channels, same.width), nn.Identity(), nn.Linear(same.width, same.latent_dim))
        )

    def forward(self, patched_audio: Tensor) -> Tensor:
        """Return [B, latent_dim, T] float32 for patches [B, channels · patch_size, stride · T] float32.

        Patches are completed with zeros to whole latents, and latents to a multiple of `latents_multiple`.
        """
        resampler, _, project = self.layers
        assert isinstance(resampler, Resampler)
        batch = patched_audio.shape[0]
        missing = -patched_audio.shape[-1] % (self.stride * self.multiple)
        if missing:
            patched_audio = F.pad(patched_audio, (0, missing))
        patches = resampler.mapping(patched_audio).transpose(1, 2).contiguous().view(-1, self.stride, self.width)
        groups = F.pad(patches, (0, 0, 0, 1)) + F.pad(resampler.new_tokens, (0, 0, self.stride, 0))
        latents = resampler.transform(groups, batch)[:, self.stride :].contiguous().view(batch, -1, self.width)
        output: Tensor = project(latents).transpose(1, 2)
        return output


class _Bottleneck(nn.Module):
    """Softnorm; decoding needs its scale only, the rest is what a checkpoint holds for encoding and training."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.scaling_factor = nn.Parameter(torch.empty(1, latent_dim, 1))
        self.bias = nn.Parameter(torch.empty(1, latent_dim, 1))
        self.running_std = nn.Parameter(torch.empty(1))
        self.noise_scaling_factor = nn.Parameter(torch.empty(1, 0, 1))


class _DecoderHalf(nn.Module):
    def __init__(self, same: SameLayout) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            (
                nn.Identity(),
                nn.Linear(same.latent_dim, same.width),
                nn.Identity(),
                Resampler(same, same.width, same.io_channels),
            )
        )


class Decoder(nn.Module):
    """Latents to samples: bottleneck decode without its noise, SAME decoder, unpatching.

    Source of the arithmetic: the published Stable Audio 3 reference, its internal noise left out.
    """

    def __init__(self, layout: AutoencoderLayout) -> None:
        super().__init__()
        same = layout.decoder
        self.stride, self.width, self.multiple = same.stride, same.width, latents_multiple(same)
        self.channels, self.patch_size = layout.audio_channels, layout.patch_size
        self.bottleneck = _Bottleneck(layout.latent_dim)
        self.decoder = _DecoderHalf(same)

    def forward(self, latents: Tensor) -> Tensor:
        """Return the audio [B, channels, 4096 · T] float32 for `latents` [B, latent_dim, T] float32.

        Tokens are completed with zeros to a multiple of `latents_multiple`, and the audio is that much longer: an odd T
        through SAME-S gives 4096 · (T + 1) samples.
        """
        _, project, _, resampler = self.decoder.layers
        assert isinstance(resampler, Resampler)
        batch = latents.shape[0]
        tokens = project((latents * self.bottleneck.running_std).transpose(1, 2))
        missing = -tokens.shape[1] % self.multiple
        if missing:
            tokens = F.pad(tokens, (0, 0, 0, missing))
        tokens = tokens.view(-1, 1, self.width)
        new_tokens = resampler.new_tokens.expand(1, self.stride, self.width)
        groups = F.pad(tokens, (0, 0, 0, self.stride)) + F.pad(new_tokens, (0, 0, 1, 0))
        patches = resampler.transform(groups, batch)[:, 1:].contiguous().view(batch, -1, self.width)
        patched = resampler.mapping(patches.transpose(1, 2))
        samples: Tensor = patched.view(batch, self.channels, self.patch_size, -1).transpose(2, 3)
        return samples.contiguous().view(batch, self.channels, -1)


def latents_multiple(same: SameLayout) -> int:
    """Return what the number of latents must be a multiple of: 2 for SAME-S's windows, 1 for SAME-L."""
    return 1 if same.chunk_size is None else same.chunk_size // same.stride
