"""Latents to audio and audio to latents, window by window, in memory that does not grow with the duration."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Floats, Session
from sa3_convert.checkpoint.dimensions import AutoencoderLayout, SameLayout
from sa3_convert.errors import BundleError
from sa3_convert.system.untrusted import read_json


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """latents = (encoded · scaling_factor + bias) / running_std."""

    scaling_factor: Floats
    """[1, C, 1]."""
    bias: Floats
    """[1, C, 1]."""
    running_std: np.float32

    @classmethod
    def read(cls, path: Path, channels: int) -> Self:
        """Read `bottleneck_params.json`; raise BundleError if its numbers cannot be what they are named after."""
        try:
            values = read_json(path)
            # What float32 does not hold becomes infinite, and is refused as such.
            with np.errstate(over="ignore"):
                scaling_factor, bias, running_std = (
                    np.array(values[key], dtype=np.float32) for key in ("scaling_factor", "bias", "running_std")
                )
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}. Convert again.") from None
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise BundleError(f"{path} is damaged: {type(error).__name__}: {error}. Convert again.") from None
        problem = _problem(scaling_factor, bias, running_std, channels)
        if problem:
            raise BundleError(f"{path} is damaged: {problem}. Convert again.")
        return cls(scaling_factor, bias, np.float32(running_std[0]))

    def encode(self, encoded: Floats) -> Floats:
        """Return latents [B, C, T] for what the encoder gives, [B, C, T]."""
        latents: Floats = (encoded * self.scaling_factor + self.bias) / self.running_std
        return latents


def _problem(scaling_factor: NDArray[Any], bias: NDArray[Any], running_std: NDArray[Any], channels: int) -> str | None:
    for name, array in (("scaling_factor", scaling_factor), ("bias", bias)):
        if array.shape != (1, channels, 1):
            return f"{name} has shape {list(array.shape)}, expected [1, {channels}, 1]"
    if running_std.shape != (1,) or not running_std[0] > 0:
        return f"running_std is {running_std.tolist()}, expected one positive number"
    if not all(np.isfinite(array).all() for array in (scaling_factor, bias, running_std)):
        return "it holds numbers that are not finite"
    return None


@dataclass(frozen=True, slots=True)
class Reach:
    """What a latent's output depends on, for chunks that start and end at multiples of `align`."""

    align: int
    """The model works on multiples of this many latents."""
    left: int
    """Latents of context before a chunk, a multiple of `align`."""
    right: int
    """Latents of context after a chunk, a multiple of `align`."""

    @classmethod
    def of_decoder(cls, half: SameLayout) -> "Reach":
        """Return the reach of a decoder, whose mapping stands after the layers."""
        if half.chunk_size is not None:
            return cls._chunked(half, 1)
        return cls._sliding(half)

    @classmethod
    def of_encoder(cls, half: SameLayout) -> "Reach":
        """Return the reach of an encoder, whose mapping stands before the layers, so that its reach adds to theirs."""
        if half.chunk_size is not None:
            return cls._chunked(half, 1 if half.mapping_kernel == 1 else 2)
        return cls._sliding(half)

    @classmethod
    def _chunked(cls, half: SameLayout, contexts: int) -> "Reach":
        assert half.chunk_size is not None
        align = half.chunk_size // half.stride
        return cls(align, contexts * align, contexts * align)

    @classmethod
    def _sliding(cls, half: SameLayout) -> "Reach":
        assert half.sliding_window is not None
        left, right = (half.depth * side + (half.mapping_kernel > 1) for side in half.sliding_window)
        return cls(1, left, right)

    def whole(self, latents: int) -> int:
        """Return `latents` rounded up to what the model works on."""
        return -(-latents // self.align) * self.align

    @property
    def smallest_window(self) -> int:
        """The shortest window that moves on at all."""
        return self.left + self.right + self.align


@dataclass(frozen=True, slots=True)
class Window:
    """One run of the model over latents [start, stop), of whose output [keep_start, keep_stop) counts."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


def windows(total: int, wanted: int, size: int, reach: Reach) -> Iterator[Window]:
    """Yield windows whose kept parts are, one after the other, the output for latents [0, wanted) of `total`.

    All windows have the same length (one shape for the model), at most `size` rounded up to the model's alignment: the
    shortest that needs no more of them. `total` is a multiple of that alignment.
    """
    if total % reach.align or not 0 < wanted <= total:
        raise ValueError(f"{wanted} of {total} latents, which come in multiples of {reach.align}")
    if size < reach.smallest_window:
        raise ValueError(f"windows of {size} latents; the model needs at least {reach.smallest_window}")
    # Nothing beyond the right context of what is wanted can change it.
    end = min(total, reach.whole(wanted) + reach.right)
    context = reach.left + reach.right
    count = max(1, -(-(end - context) // (reach.whole(size) - context)))
    size = reach.whole(-(-(end + (count - 1) * context) // count))
    done = 0
    while done < wanted:
        # The last window ends where the latents end, and overlaps the one before it further.
        start = max(0, min(done - reach.left, end - size))
        stop = min(start + size, end)
        keep_stop = wanted if stop == end else stop - reach.right
        yield Window(start, stop, done, keep_stop)
        done = keep_stop


WINDOW = 128
"""Latents per run of the autoencoder (12 seconds)."""


def decoded(
    session: Session, latents: Floats, layout: AutoencoderLayout, *, samples: int | None = None, window: int = WINDOW
) -> Iterator[Floats]:
    """Yield the audio of latents [1, C, T] in chunks [1, channels, n], not clipped; joined, they are one run.

    If T is not a multiple of what the decoder works on (SAME-S: odd), zero latents are appended and their audio is cut
    off. The reference pads one layer later, so its end differs a little. What lies beyond `samples` is not computed.
    """
    ratio = layout.downsampling_ratio
    reach = Reach.of_decoder(layout.decoder)
    samples = latents.shape[2] * ratio if samples is None else samples
    if not 0 < samples <= latents.shape[2] * ratio:
        raise ValueError(f"{samples} samples of {latents.shape[2]} latents")
    latents = _padded(latents, reach.whole(latents.shape[2]))
    for part in windows(latents.shape[2], -(-samples // ratio), max(window, reach.smallest_window), reach):
        audio = session.run({"latents": latents[:, :, part.start : part.stop]})["audio"]
        begin = (part.keep_start - part.start) * ratio
        end = min(part.keep_stop * ratio, samples) - part.start * ratio
        yield audio[:, :, begin:end]


def encoded(session: Session, audio: Floats, layout: AutoencoderLayout, *, window: int = WINDOW) -> Floats:
    """Return what the encoder gives for audio, before the bottleneck; the same as from one run over all of it.

    Audio is [1, channels, N], padded with silence to whole latents; the result is [1, C, ceil(N / downsampling ratio)].
    """
    stride = layout.encoder.stride
    reach = Reach.of_encoder(layout.encoder)
    latents = -(-audio.shape[2] // layout.downsampling_ratio)
    total = reach.whole(latents)
    patches = patched(_padded(audio, total * layout.downsampling_ratio), layout.patch_size)
    parts = []
    for part in windows(total, latents, max(window, reach.smallest_window), reach):
        feed = np.ascontiguousarray(patches[:, :, part.start * stride : part.stop * stride])
        output = session.run({"patched_audio": feed})["encoder_latent"]
        parts.append(output[:, :, part.keep_start - part.start : part.keep_stop - part.start])
    return np.concatenate(parts, axis=2)


def patched(audio: Floats, patch_size: int) -> Floats:
    """Fold [B, channels, N] into [B, channels · patch_size, N / patch_size]; N is a multiple of the patch size."""
    batch, channels, samples = audio.shape
    folded = audio.reshape(batch, channels, samples // patch_size, patch_size).transpose(0, 1, 3, 2)
    return folded.reshape(batch, channels * patch_size, samples // patch_size)


def _padded(array: Floats, length: int) -> Floats:
    """Append zeros to the last dimension."""
    missing = length - array.shape[2]
    return np.pad(array, ((0, 0), (0, 0), (0, missing))) if missing else array
