"""Latents to audio and audio to latents, window by window, in memory that does not grow with the duration."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sa3_convert.checkpoint.layout import AutoencoderLayout
from sa3_convert.errors import ModelFileError
from sa3_convert.runtime.bottleneck import Bottleneck
from sa3_convert.runtime.chunks import Reach, windows
from sa3_convert.session import Session

Floats = NDArray[np.float32]

WINDOW = 128
"""Latents per run of the autoencoder (12 seconds)."""


def decoded(
    session: Session, latents: Floats, layout: AutoencoderLayout, *, samples: int | None = None, window: int = WINDOW
) -> Iterator[Floats]:
    """Yield the audio of latents, chunk by chunk; joined, it equals one run over all of them.

    Args:
        session: the decoder.
        latents: [1, C, T] float32; if T is not a multiple of what the decoder works on (SAME-S: odd), zero latents are
            appended and their audio is cut off. The reference pads one layer later, so its end differs a little.
        layout: the autoencoder's dimensions.
        samples: how many samples are wanted, default all T · downsampling ratio; what lies beyond is not computed.
        window: latents per run, at least what the decoder reaches; see `Reach.smallest_window`.

    Yields:
        [1, audio channels, n] float32, as the decoder gives it (not clipped).

    """
    ratio = layout.downsampling_ratio
    reach = Reach.of_decoder(layout.decoder)
    samples = latents.shape[2] * ratio if samples is None else samples
    if not 0 < samples <= latents.shape[2] * ratio:
        raise ValueError(f"{samples} samples of {latents.shape[2]} latents")
    latents = _padded(latents, reach.whole(latents.shape[2]))
    for part in windows(latents.shape[2], -(-samples // ratio), max(window, reach.smallest_window), reach):
        audio = session.run({"latents": np.ascontiguousarray(latents[:, :, part.start : part.stop])})["audio"]
        _require_length(audio, (part.stop - part.start) * ratio, "decoder")
        begin = (part.keep_start - part.start) * ratio
        end = min(part.keep_stop * ratio, samples) - part.start * ratio
        yield audio[:, :, begin:end]


def decoded_with_overlap(
    session: Session, latents: Floats, layout: AutoencoderLayout, *, chunk: int, overlap: int
) -> Floats:
    """Decode as the published reference does by default: fixed chunks, half the overlap cut off at inner edges.

    Here for comparison with it only: `decoded` is exact and computes less.

    Args:
        session: the decoder.
        latents: [1, C, T] float32.
        layout: the autoencoder's dimensions.
        chunk: latents per chunk (128 in the reference).
        overlap: latents that neighbours share (32 in the reference).

    Returns:
        [1, audio channels, T · downsampling ratio] float32.

    """
    ratio, total = layout.downsampling_ratio, latents.shape[2]
    if total < chunk:
        return session.run({"latents": latents})["audio"]
    starts = [*range(0, total - chunk, chunk - overlap), total - chunk]
    cut = overlap // 2
    audio = np.zeros((1, layout.audio_channels, total * ratio), np.float32)
    for start in starts:
        part = session.run({"latents": np.ascontiguousarray(latents[:, :, start : start + chunk])})["audio"]
        first = 0 if start == 0 else cut
        last = chunk if start == total - chunk else chunk - cut
        audio[:, :, (start + first) * ratio : (start + last) * ratio] = part[:, :, first * ratio : last * ratio]
    return audio


def encoded(
    session: Session, audio: Floats, layout: AutoencoderLayout, bottleneck: Bottleneck, *, window: int = WINDOW
) -> Floats:
    """Return the latents of audio; the same as from one run over all of it.

    Args:
        session: the encoder.
        audio: [1, audio channels, N] float32, N ≥ 1; padded with silence to whole latents.
        layout: the autoencoder's dimensions.
        bottleneck: of the same checkpoint.
        window: latents per run.

    Returns:
        [1, C, ceil(N / downsampling ratio)] float32.

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
        _require_length(output, part.stop - part.start, "encoder")
        parts.append(output[:, :, part.keep_start - part.start : part.keep_stop - part.start])
    return bottleneck.encode(np.concatenate(parts, axis=2))


def _require_length(output: Floats, length: int, model: str) -> None:
    if output.ndim != 3 or output.shape[2] != length:
        raise ModelFileError(f"The {model} gave {list(output.shape)} where {length} along the last axis were expected.")


def patched(audio: Floats, patch_size: int) -> Floats:
    """Fold [B, channels, N] into [B, channels · patch_size, N / patch_size]; N is a multiple of the patch size."""
    batch, channels, samples = audio.shape
    folded = audio.reshape(batch, channels, samples // patch_size, patch_size).transpose(0, 1, 3, 2)
    return folded.reshape(batch, channels * patch_size, samples // patch_size)


def _padded(array: Floats, length: int) -> Floats:
    """Append zeros to the last dimension."""
    missing = length - array.shape[2]
    return np.pad(array, ((0, 0), (0, 0), (0, missing))) if missing else array
