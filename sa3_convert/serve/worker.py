"""The process that holds the models: it makes one piece at a time, and tells and is told over a connection, in JSON.

It writes the files itself, so that audio crosses no process; what it tells are names, counts and sentences.
"""

import contextlib
import json
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from sa3_convert.bundle.reader import Bundle
from sa3_convert.errors import ConversionError, InputError, Sa3Error, told_by_system
from sa3_convert.runtime.audio import AudioWriter, PcmStream, audio_writer, growing_wav
from sa3_convert.runtime.engines import KINDS, EngineName
from sa3_convert.runtime.events import AudioChunk, Report, Started, Stepped
from sa3_convert.runtime.opening import adapters_told, made_by
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest, ResolvedRequest
from sa3_convert.system.files import write_text
from sa3_convert.system.supervisor import supervise


@dataclass(frozen=True, slots=True)
class Served:
    """A bundle under an engine."""

    path: Path
    engine: EngineName
    options: Mapping[str, Any]
    chosen: str | None = None
    """Why this engine, where nobody named one."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """What can be asked for, by name."""

    def bytes(self) -> int:
        """Return how much its models take on disk; in memory it is at least that."""
        return Bundle.open(self.path).manifest.opened_bytes(KINDS[self.engine], adapters=bool(self.adapters))


def hidden(text: str, adapters: Mapping[str, Path]) -> str:
    """Return what is told to clients, with names for files."""
    for name, path in adapters.items():
        text = text.replace(str(path), name)
    return text


class _CancelledError(Exception):
    """The piece is not wanted any more."""


def work(connection: Connection, served: Mapping[str, Served], keep_bytes: int) -> None:
    """Work until the connection ends. If a library ends the process that works, this one tells so in its place."""
    ended = supervise(lambda: _Worker(connection, served, keep_bytes).to_the_end())
    with contextlib.suppress(OSError):
        _send(connection, event="gone", sentence=ended.complaint if ended.code == InputError.exit_code else None)


def _send(connection: Connection, **message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _said(error: Exception) -> str:
    """Return in a sentence what the system or a library raised; what is a bug is shown on stderr."""
    known = told_by_system(error)
    if isinstance(known, ConversionError):
        return "Memory ran out. Ask for less audio, or serve fewer bundles at a time."
    if known is not None:
        return str(known)
    traceback.print_exception(error, file=sys.stderr)
    return f"This is a bug in sa3-convert: {type(error).__name__}: {error}"


class _Worker:
    def __init__(self, connection: Connection, served: Mapping[str, Served], keep_bytes: int) -> None:
        self._connection, self._served, self._keep_bytes = connection, served, keep_bytes
        self._open: OrderedDict[str, Pipeline] = OrderedDict()

    def to_the_end(self) -> int:
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                asked = json.loads(self._connection.recv_bytes())
                if "settings" in asked:
                    self._make(asked)
        return 0

    def _make(self, asked: Mapping[str, Any]) -> None:
        def tell(event: str, **more: Any) -> None:
            _send(self._connection, job=asked["id"], event=event, **more)

        tell("started")
        try:
            tell("done", **self._made(asked, tell))
        except _CancelledError:
            tell("cancelled")
        except Sa3Error as error:
            tell("failed", sentence=str(error))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:  # it costs this piece, not the others
            tell("failed", sentence=_said(error))
        self._free()

    def _made(self, asked: Mapping[str, Any], tell: Any) -> dict[str, Any]:
        if asked["model"] not in self._open:
            tell("loading")
        pipeline, output = self._pipeline(asked["model"]), Path(asked["output"])
        request = GenerateRequest.from_json(asked["settings"]).resolved(pipeline.layout)
        rate, samples, peak = pipeline.layout.sample_rate, 0, 0.0
        made = made_by(pipeline, adapters=bool(request.adapters)) | adapters_told(pipeline, request.adapters)
        metadata = {"request": request.to_json(output.parent) | asked["told"]} | made
        report, steps = None, 0
        stream = pipeline.stream(request)
        with _writer(output, pipeline, request, metadata, tell) as file, closing(stream) as events:
            for event in events:
                self._heed(asked["id"])
                if isinstance(event, Started):
                    tell("stage", stage=event.stage)
                elif isinstance(event, Stepped):
                    tell("step", done=(steps := steps + 1), of=event.steps)
                elif isinstance(event, AudioChunk):
                    file.write(event.samples)
                    samples, peak = event.start + event.samples.shape[1], max(peak, float(np.abs(event.samples).max()))
                    tell("audio", samples=samples)
                else:
                    report = event
            self._heed(asked["id"])
        assert isinstance(report, Report)
        figures = {
            "seconds": dict(report.seconds),
            "engine": dict(report.engine),
            "duration": samples / rate,
            "sample_rate": rate,
            "peak": peak,
            "warnings": [hidden(one, self._served[asked["model"]].adapters) for one in report.warnings],
        }
        told = {"schema": 1, "output": output.name, **metadata, **figures}
        write_text(output.with_suffix(".json"), json.dumps(told, indent=2) + "\n")
        return told

    def _heed(self, job: str) -> None:
        while self._connection.poll():
            if json.loads(self._connection.recv_bytes()).get("cancel") == job:
                raise _CancelledError

    def _pipeline(self, name: str) -> Pipeline:
        served = self._served[name]
        if name not in self._open:
            self._free(served.bytes())
            how: dict[str, Any] = {"keep_loaded": True, **served.options}
            self._open[name] = Pipeline.from_bundle(served.path, served.engine, **how)
        self._open.move_to_end(name)
        return self._open[name]

    def _free(self, needed: int = 0) -> None:
        """Let go of bundles, the least recently used first, until there is room; the one in use stays."""
        import psutil

        process = psutil.Process()
        while len(self._open) > (needed == 0) and process.memory_info().rss + needed > self._keep_bytes:
            self._open.popitem(last=False)[1].close()


@contextlib.contextmanager
def _writer(
    output: Path, pipeline: Pipeline, request: ResolvedRequest, metadata: Mapping[str, Any], tell: Any
) -> Iterator[AudioWriter | PcmStream]:
    """Yield what takes the audio: a WAV that grows, or for a loop, which comes as a whole, one that says that it is."""
    rate = pipeline.layout.sample_rate
    if request.loop is not None:
        with audio_writer(output, rate, metadata=metadata, loop=True) as whole:
            yield whole
        return
    samples = request.lengths(pipeline.layout).samples
    with growing_wav(
        output, rate, samples, metadata=metadata, report=lambda path: tell("growing", name=path.name)
    ) as growing:
        yield growing
