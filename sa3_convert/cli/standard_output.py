"""Raw samples on standard output."""

import contextlib
from collections.abc import Iterator

from sa3_convert.cli.console import stderr
from sa3_convert.errors import AudioError, UsageError
from sa3_convert.runtime.audio import PcmStream, SampleFormat
from sa3_convert.streams import STANDARD_OUTPUT, is_terminal, opened_stream

_NAMES = {"pcm16": "s16le", "pcm24": "s24le", "float": "f32le"}


@contextlib.contextmanager
def pcm_to_standard_output(rate: int, *, sample_format: SampleFormat, dither: bool) -> Iterator[PcmStream]:
    """Yield a writer of raw samples.

    Raises:
        UsageError: standard output is a terminal.
        AudioError: what reads the samples has closed the pipe.

    """
    if is_terminal(STANDARD_OUTPUT):
        raise UsageError("--stream without -o writes raw samples. Pipe them into something, or give -o FILE.wav.")
    stderr.print(f"Samples on standard output: {_NAMES[sample_format]}, 2 channels, {rate} Hz.")
    try:
        with opened_stream(STANDARD_OUTPUT) as stream:
            yield PcmStream(stream, sample_format=sample_format, dither=dither)
    except BrokenPipeError:
        raise AudioError("What read the samples has closed the pipe; generation has stopped.") from None
