"""What `run` does: events of generations into files or standard output, progress and results for the terminal."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typer import Exit

from sa3_convert.bundle.overlap import Named
from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli.console import progress, show_raised, stderr, stdout, tell_unverified
from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import hub_origin, write_figures
from sa3_convert.cli.play import play_files, silent_because
from sa3_convert.errors import AudioError, BundleError, OutputRejectedError, SettingError, UsageError
from sa3_convert.lab.doctor.results import CONVERSION_SETTING, saved, setting_name
from sa3_convert.mnn.compatibility import require_backend
from sa3_convert.runtime.audio import (
    PcmStream,
    SampleFormat,
    audio_writer,
    check_growing_path,
    check_output_path,
    check_replaceable,
    growing_wav,
)
from sa3_convert.runtime.batch import RESULTS, BatchOptions, BatchResult, Workers, run_batch
from sa3_convert.runtime.batch_file import BatchItem
from sa3_convert.runtime.conditioning import max_seconds
from sa3_convert.runtime.engines import Backend, EngineName, Level
from sa3_convert.runtime.events import AudioChunk, Report, Started, Stepped
from sa3_convert.runtime.opening import Opening, adapters_told, made_by
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.placement import engine_for, parse_places, placement
from sa3_convert.runtime.request import GenerateRequest, ResolvedRequest
from sa3_convert.scheduling import Runner
from sa3_convert.system.machine import PeakMemory
from sa3_convert.system.streams import STANDARD_OUTPUT, descriptor_of, is_stream, is_terminal, opened_stream

_NAMES = {"pcm16": "s16le", "pcm24": "s24le", "float": "f32le"}


@contextlib.contextmanager
def pcm_to_standard_output(rate: int, *, sample_format: SampleFormat, dither: bool) -> Iterator[PcmStream]:
    """Yield a writer of raw samples."""
    if is_terminal(STANDARD_OUTPUT):
        raise UsageError("--stream without -o writes raw samples. Pipe them into something, or give -o FILE.wav.")
    stderr.print(f"Samples on standard output: {_NAMES[sample_format]}, 2 channels, {rate} Hz.")
    try:
        with opened_stream(STANDARD_OUTPUT) as stream:
            yield PcmStream(stream, sample_format=sample_format, dither=dither)
    except BrokenPipeError:
        raise AudioError("What read the samples has closed the pipe; generation has stopped.") from None


def placed(
    backend: Backend, precision: Level, memory: Level, overrides: Sequence[str], *, split: bool = False
) -> dict[str, Any]:
    """Return where components run, and which never at precision low, as options of an engine.

    It is said on stderr, with reasons, unless all is as usual.
    """
    given = parse_places(overrides)
    for wanted in {backend, *given.values()} - {"cpu"}:
        require_backend(wanted)
    how: dict[str, Any] = {"precision": precision, "memory": memory, "overrides": given, "split": split}
    # The usual setting on the CPU is not questioned: what was found there need not be read at every start.
    usual = backend == "cpu" and setting_name(precision, memory) == CONVERSION_SETTING
    places = placement(backend, None if usual else saved(backend), **how)
    for place in places:
        if backend != "cpu" or given or place.precision != precision:
            stderr.print(f"{place.component.value} on {place.backend}: {place.reason}")
    never = tuple(place.component for place in places if place.precision != precision)
    return {"places": {place.component: place.backend for place in places}, "never_low": never}


def chosen_engine(bundle: Path, backend: Backend, options: Sequence[str] = (), **how: Any) -> tuple[EngineName, str]:
    """Return the engine that runs a bundle on a device, and why; see `engine_for`.

    It is told: of a device that may not be there at once, of the processor with what it has made.
    """
    name, why = engine_for(Bundle.open(bundle), backend, options, **how)
    if backend != "cpu":
        tell_engine(name, backend, why)
    return name, why


def tell_engine(name: EngineName, backend: Backend, why: str) -> None:
    """Say on stderr which engine was chosen, and why."""
    stderr.print(f"Engine {name} on {backend}: {why}.")


@contextlib.contextmanager
def _opened(target: "Target", **options: Any) -> Iterator[Pipeline]:
    """Yield the pipeline; what runs at another precision than was asked for is told."""
    with target.opening.open(**options) as pipeline:
        tell_unverified(pipeline.manifest, target.bundle)
        show_raised(pipeline.models.engine)
        yield pipeline


_STAGES = {"text": "reading the prompt", "encode": "encoding audio", "denoise": "denoising", "decode": "decoding"}


@dataclass(frozen=True, slots=True)
class Target:
    """What generates, and where the audio goes."""

    bundle: Path
    engine: EngineName
    options: Mapping[str, Any]
    """Of the engine."""
    output: Path
    """A file or a stream; for batches a folder."""
    sample_format: SampleFormat
    dither: bool
    allow: tuple[str, ...]
    json_file: Path | None
    force: bool = False
    """Replace files that stand there."""
    chosen: str | None = None
    """Why this engine, where nobody named one."""

    @property
    def opening(self) -> Opening:
        """How its models are opened."""
        return Opening(self.bundle, self.engine, self.options)

    def outputs(self, count: int) -> list[Path]:
        """Return the files of so many variations."""
        if count == 1:
            return [self.output]
        stem, ending = self.output.stem, self.output.suffix
        return [self.output.with_name(f"{stem}-{n:0{len(str(count))}}{ending}") for n in range(1, count + 1)]

    def tell_chosen(self) -> None:
        """Say why this engine has run, if that was not said before."""
        if self.chosen is not None and self.options["backend"] == "cpu":
            tell_engine(self.engine, "cpu", self.chosen)

    def metadata(self, pipeline: Pipeline, *, adapters: bool) -> dict[str, Any]:
        """Return what files tell about the models that made them: those that were opened."""
        return made_by(pipeline, adapters=adapters) | (hub_origin(self.bundle) if pipeline.manifest is not None else {})


class _Writer(Protocol):
    def write(self, audio: NDArray[np.float32]) -> None: ...


def generate(
    target: Target,
    requests: Sequence[GenerateRequest],
    *,
    stream: bool,
    play: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Generate one piece, or variations that differ by their seeds, each into a file of its own.

    A file takes its name when it is whole and has passed its checks. `origin` is what `--json` once told about the
    models of a request that is replayed.
    """
    if stream and any(request.loop for request in requests):
        raise UsageError("A loop cannot be streamed: its beginning is made of what follows its end. Drop --stream.")
    if stream and (requests[0].peak == "attenuate" or requests[0].loudness is not None):
        raise SettingError("{peak} attenuate and {loudness} need the whole piece first; a stream cannot wait for it.")
    silent = silent_because() if play else None
    outputs = target.outputs(len(requests))
    for output in outputs:
        if not stream:
            check_output_path(output, target.sample_format)
        elif descriptor_of(output) != 1:
            check_growing_path(output)
    entries: list[dict[str, Any]] = []
    rejected: list[str] = []
    with PeakMemory() as device, _opened(target, keep_loaded=len(requests) > 1) as pipeline:
        made_by = target.metadata(pipeline, adapters=bool(requests[0].adapters))
        made_by |= adapters_told(pipeline, requests[0].adapters)
        if origin:
            _check_origin(target, made_by, origin)
        asked = [request.resolved(pipeline.layout) for request in requests]
        _tell_duration(requests[0], asked[0], pipeline)
        pieces = [
            _Piece(output, request, {"request": request.to_json(_folder_of(output))} | made_by)
            for output, request in zip(outputs, asked, strict=True)
        ]
        for piece in pieces:
            if not target.force:
                check_replaceable(piece.output, piece.metadata)
        for piece in pieces:
            try:
                entries.append(_made(target, pipeline, piece, stream))
                if piece is pieces[0]:
                    target.tell_chosen()
            except OutputRejectedError as error:
                rejected.append(f"{piece.output}: {error}")
    figures = {"device_peak_bytes": device.bytes}
    if device.bytes is not None:
        stdout.print(f"At most {device.bytes / 2**20:.0f} MiB of the GPU's memory.")
    if entries:
        told = entries[0] if len(requests) == 1 else {"variations": entries}
        write_figures(target.json_file, told | figures)
    if silent is not None:
        stderr.print(f"Note: nothing can be played here ({silent}); the files are there.")
    elif play:
        play_files(Path(entry["output"]) for entry in entries)
    if rejected:
        raise OutputRejectedError("\n".join(rejected))


@dataclass(frozen=True, slots=True)
class _Piece:
    """One file that is generated."""

    output: Path
    request: ResolvedRequest
    metadata: Mapping[str, Any]


def _made(target: Target, pipeline: Pipeline, piece: _Piece, stream: bool) -> dict[str, Any]:
    """Generate a piece, say what was made, and return what `--json` tells of it."""
    with _writer(target, pipeline, piece, stream) as writer:
        report, peak = _played(pipeline, piece.request, writer, target.allow)
    for warning in report.warnings:
        stderr.print(f"Note: {warning}")
    total = sum(report.seconds.values())
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    engine = ", ".join(f"{name} {value}" for name, value in report.engine.items())
    rate = pipeline.layout.sample_rate
    length = report.lengths.samples / rate
    stdout.print(
        f"{piece.output}: {length:.2f} s of audio at {rate} Hz, peak {peak:.3f}, "
        f"seed {report.request.seed}, {report.request.steps} {report.request.sampler} steps\n"
        f"in {total:.1f} s ({stages}), {length / total:.2f} × real time, on {engine}",
        soft_wrap=True,
    )
    told = {"output": str(piece.output), **piece.metadata}
    if target.json_file is not None:
        told["request"] = piece.request.to_json(_folder_of(target.json_file))
    how = dict(report.engine) | ({"chosen": target.chosen} if target.chosen else {})
    return told | {"engine": how, "seconds": dict(report.seconds)}


def _tell_duration(given: GenerateRequest, resolved: ResolvedRequest, pipeline: Pipeline) -> None:
    """Say how long a piece gets where given audio decides it."""
    if given.seconds is None and given.loop is None and given.audio_files():
        limit = max_seconds(pipeline.layout)
        least = ", the longest of this model" if resolved.seconds == limit else ""
        stderr.print(f"Note: {resolved.seconds:.2f} seconds, as the given audio{least}; --seconds changes that.")


def _folder_of(path: Path) -> Path | None:
    """Return the folder of a file that is written; what goes into a stream has none."""
    return None if is_stream(path) else path.parent


def _check_origin(target: Target, here: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Refuse a replay on another variant, and say when other models than the first time will run."""
    variant = origin.get("variant", here["variant"])
    if variant != here["variant"]:
        raise BundleError(f"These settings were made with {variant}; {target.bundle} holds {here['variant']}.")
    if origin.get("models", here["models"]) != here["models"]:
        stderr.print("Note: these settings were made with other models of this variant; the samples will differ.")
    then = [told for told in origin.get("adapters", ()) if isinstance(told, dict)]
    for one in here.get("adapters", ()):
        if one not in then and any(told.get("name") == one["name"] for told in then):
            stderr.print(f"Note: {one['name']} is another file than it was then; the samples will differ.")


def generate_batch(
    target: Target,
    items: Sequence[BatchItem],
    *,
    keep_loaded: bool,
    reads: tuple[Named, ...] = (),
    runner: Runner | None = None,
) -> None:
    """Generate what a batch lists and an earlier run has not done, a line on standard output for each.

    Rejected outputs are an error after the last line; `reads` is what none of them may be written over; `runner` is of
    workers, in place of this process.
    """
    codes: list[int] = []
    with _opened(target, keep_loaded=keep_loaded) as pipeline:
        how = (target.sample_format, target.dither, target.allow)
        used = {bool(item.request.adapters) for item in items}
        plain, adapted = (target.metadata(pipeline, adapters=a) if a in used else None for a in (False, True))
        options = BatchOptions(target.output, *how, plain, adapted, reads, target.force)
        workers = None if runner is None else Workers(runner, target.opening)
        with (
            progress("generating") as tick,
            contextlib.closing(run_batch(pipeline, items, options, workers)) as results,
        ):
            for done, result in enumerate(results, 1):
                if done == 1:
                    target.tell_chosen()
                tick("generating", done, len(items))
                for warning in result.warnings:
                    stderr.print(f"Note on line {result.line}: {warning}")
                stdout.print(_result_line(result), soft_wrap=True)
                codes += [result.exit_code] if result.error is not None else []
    where = f"{target.output / RESULTS} says why. The others are there."
    if set(codes) == {OutputRejectedError.exit_code}:
        raise OutputRejectedError(f"{len(codes)} of {len(items)} outputs failed their checks; {where}")
    if codes:
        echo(f"sa3-convert: {len(codes)} of {len(items)} outputs could not be had; {where}", err=True)
        raise Exit(max(codes))


def _result_line(result: BatchResult) -> str:
    if result.error is not None:
        what = "rejected" if result.exit_code == OutputRejectedError.exit_code else "failed"
        return f"line {result.line}: {result.output}: {what}: {result.error}"
    seconds = sum((result.seconds or {}).values())
    done = "done by an earlier run" if result.reused else f"{seconds:.1f} s"
    return f"line {result.line}: {result.output}: seed {result.request['seed']}, {done}"


@contextlib.contextmanager
def _writer(target: Target, pipeline: Pipeline, piece: _Piece, stream: bool) -> Iterator[_Writer]:
    """Yield what takes the audio: a file or stream that gets it whole, one that grows, or standard output."""
    rate = pipeline.layout.sample_rate
    how: dict[str, Any] = {"sample_format": target.sample_format, "dither": target.dither}
    if not stream:
        loop = piece.request.loop is not None
        with audio_writer(piece.output, rate, metadata=piece.metadata, loop=loop, **how) as file:
            yield file
    elif descriptor_of(piece.output) == 1:
        with pcm_to_standard_output(rate, **how) as pcm:
            yield pcm
    else:
        samples = piece.request.lengths(pipeline.layout).samples
        with growing_wav(piece.output, rate, samples, metadata=piece.metadata, report=_tell, **how) as growing:
            yield growing


def _played(
    pipeline: Pipeline, request: GenerateRequest, writer: _Writer, allow: tuple[str, ...]
) -> tuple[Report, float]:
    """Run a generation with progress; return its report and the peak of its audio."""
    report: Report | None = None
    peak = 0.0
    stage, done = "starting", 0
    events_of = pipeline.stream(request, allow=allow)
    with progress(stage) as tick, contextlib.closing(events_of) as events:
        for event in events:
            if isinstance(event, Started):
                stage, done = _STAGES[event.stage], 0
                tick(stage, 0, None)
            elif isinstance(event, Stepped):
                done += 1
                tick(stage, done, event.steps)
            elif isinstance(event, AudioChunk):
                writer.write(event.samples)
                peak = max(peak, float(np.abs(event.samples).max(initial=0.0)))
            else:
                report = event
    assert report is not None
    return report, peak


def _tell(growing: Path) -> None:
    stderr.print(f"Until it is whole, {growing} can be read while it grows.")
