"""A WAV that can be read while it grows."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sa3_convert.errors import AudioError, UsageError
from sa3_convert.runtime import riff
from sa3_convert.runtime.audio import PcmStream, SampleFormat

_CHANNELS = 2
_BYTES: Mapping[SampleFormat, int] = {"pcm16": 2, "pcm24": 3, "float": 4}
PARTIAL = ".partial"
"""Appended to the name of a WAV that still grows."""


@contextlib.contextmanager
def growing_wav(
    path: Path,
    rate: int,
    samples: int,
    *,
    sample_format: SampleFormat = "pcm16",
    dither: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Iterator[PcmStream]:
    """Yield a stereo writer into `path` + ".partial", which takes its name when the block ends without an error.

    Every chunk is in the file when `write` returns, and the header states the whole length from the start, so that a
    player can follow. After an error the partial file is gone.

    Args:
        path: `.wav`.
        rate: Hz.
        samples: per channel, that will be written in all.
        sample_format: of the samples.
        dither: see `audio.Quantiser`.
        metadata: kept as JSON in the file's comment.

    Raises:
        UsageError: the name is not that of a WAV, or a folder stands there.
        AudioError: the file cannot be written.

    """
    check_growing_path(path)
    header = riff.wave_header(
        samples,
        rate,
        _CHANNELS,
        _BYTES[sample_format],
        is_float=sample_format == "float",
        information=b"" if metadata is None else riff.information_chunk(json.dumps(metadata, ensure_ascii=True)),
    )
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as stream:
                stream.write(header)
                stream.flush()
                yield PcmStream(stream, sample_format=sample_format, dither=dither)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise AudioError(f"{path} cannot be written: {error.strerror or error}.") from None


def check_growing_path(path: Path) -> None:
    """Check, before any long work, that a file of this name can be written while it grows.

    Raises:
        UsageError: the name is not that of a WAV, or a folder stands there.

    """
    if path.suffix.lower() != ".wav":
        raise UsageError(f"{path}: only a WAV can be read while it grows. Name it .wav, or leave --stream away.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Name a file.")
