"""A WAV that can be read while it grows."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sa3_convert.errors import AudioError, UsageError
from sa3_convert.files import atomic_path
from sa3_convert.runtime import riff
from sa3_convert.runtime.audio import PcmStream, SampleFormat, check_output_path
from sa3_convert.streams import is_stream, opened_stream

_CHANNELS = 2
_BYTES: Mapping[SampleFormat, int] = {"pcm16": 2, "pcm24": 3, "float": 4}


@contextlib.contextmanager
def growing_wav(
    path: Path,
    rate: int,
    samples: int,
    *,
    sample_format: SampleFormat = "pcm16",
    dither: bool = False,
    metadata: Mapping[str, Any] | None = None,
    report: Callable[[Path], None] = lambda _: None,
) -> Iterator[PcmStream]:
    """Yield a stereo writer; the file grows under a name of its own, and takes `path` when the block ends well.

    Every chunk is in the file when `write` returns, and the header states the whole length from the start, so that a
    player can follow. After an error what has grown is gone. A pipe or a device is written to directly.

    Args:
        path: `.wav`.
        rate: Hz.
        samples: per channel, that will be written in all.
        sample_format: of the samples.
        dither: see `audio.Quantiser`.
        metadata: kept as JSON in the file's comment.
        report: told under which name the file grows, when that can be read.

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
    try:
        with contextlib.ExitStack() as stack:
            growing = None if is_stream(path) else stack.enter_context(atomic_path(path))
            stream = stack.enter_context(opened_stream(path) if growing is None else growing.open("wb"))
            stream.write(header)
            stream.flush()
            if growing is not None:
                report(growing)
            yield PcmStream(stream, sample_format=sample_format, dither=dither)
    except OSError as error:
        raise AudioError(f"{path} cannot be written: {error.strerror or error}.") from None


def check_growing_path(path: Path) -> None:
    """Check, before any long work, that a file of this name can be written while it grows.

    Raises:
        UsageError: the name is not that of a WAV, or a folder stands there, or a terminal.

    """
    if not is_stream(path) and path.suffix.lower() != ".wav":
        raise UsageError(f"{path}: only a WAV can be read while it grows. Name it .wav, or leave --stream away.")
    check_output_path(path, "pcm16")
