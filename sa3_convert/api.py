"""The Python API: generating audio from a bundle. These names and their meaning stay within a major version."""

from sa3_convert.runtime.audio import audio_writer, read_metadata, write_audio
from sa3_convert.runtime.events import AudioChunk, Event, Generation, Report, Started, Stepped
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest

__all__ = [
    "AudioChunk",
    "Event",
    "GenerateRequest",
    "Generation",
    "Pipeline",
    "Report",
    "Started",
    "Stepped",
    "audio_writer",
    "read_metadata",
    "write_audio",
]
