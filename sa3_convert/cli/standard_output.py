"""Standard output for audio and nothing else."""

import contextlib
import os
import sys
from collections.abc import Iterator

from sa3_convert.cli.console import stderr
from sa3_convert.errors import AudioError, UsageError
from sa3_convert.runtime.audio import PcmStream, SampleFormat

_NAMES = {"pcm16": "s16le", "pcm24": "s24le", "float": "f32le"}


@contextlib.contextmanager
def pcm_to_standard_output(rate: int, *, sample_format: SampleFormat, dither: bool) -> Iterator[PcmStream]:
    """Yield a writer of raw samples; whatever else is printed within the block goes to standard error.

    Raises:
        UsageError: standard output is a terminal.
        AudioError: what reads the samples has closed the pipe.

    """
    if sys.stdout.isatty():
        raise UsageError("--stream without -o writes raw samples. Pipe them into something, or give -o FILE.wav.")
    stderr.print(f"Samples on standard output: {_NAMES[sample_format]}, 2 channels, {rate} Hz.")
    with _alone_on_standard_output() as descriptor, open(descriptor, "wb", closefd=False) as stream:
        try:
            yield PcmStream(stream, sample_format=sample_format, dither=dither)
        except BrokenPipeError:
            # Closing the stream flushes once more what the pipe did not take.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            raise AudioError("What read the samples has closed the pipe; generation has stopped.") from None


@contextlib.contextmanager
def _alone_on_standard_output() -> Iterator[int]:
    """Yield a descriptor of standard output, while descriptor 1 itself points to standard error."""
    sys.stdout.flush()
    audio = os.dup(1)
    try:
        os.dup2(2, 1)
        yield audio
    finally:
        sys.stdout.flush()
        os.dup2(audio, 1)
        os.close(audio)
