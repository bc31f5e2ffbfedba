"""SAME's encoder (patches to latents) and decoder (latents to samples), each with what the converted model includes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_convert.checkpoint.dimensions import AutoencoderLayout, SameLayout
from sa3_convert.networks.same import Resampler


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
