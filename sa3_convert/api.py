"""The Python API: generating audio from a bundle. These names and their meaning stay within a major version.

Models run in the caller's own process. MNN trusts a model file, and `tokenizers` a tokenizer: one that was made for it,
with every hash right, can end the process or never come back. The command line holds them in a child process; who opens
bundles of strangers through this API does the same.
"""

from sa3_convert.checkpoint.dimensions import FluxShift, FullShift, LogSnrShift, NoShift
from sa3_convert.runtime.audio import audio_writer, read_metadata, write_audio
from sa3_convert.runtime.events import AudioChunk, Event, Generation, Report, Started, Stepped
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.setting_values import AdapterRequest

__all__ = [
    "AdapterRequest",
    "AudioChunk",
    "Event",
    "FluxShift",
    "FullShift",
    "GenerateRequest",
    "Generation",
    "LogSnrShift",
    "NoShift",
    "Pipeline",
    "Report",
    "Started",
    "Stepped",
    "audio_writer",
    "read_metadata",
    "write_audio",
]
