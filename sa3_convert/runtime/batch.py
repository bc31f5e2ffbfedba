"""Many generations: checked as a whole before the first, resumable after the last that was done.

`results.jsonl` beside the files gets one line per generation that was finished or rejected. A generation counts as done
when such a line holds exactly its settings, it was made from the same models, adapters and audio, written in the same
way, and its file is whole.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sa3_convert.bundle.overlap import Named, require_apart
from sa3_convert.errors import AudioError, InputError, OutputRejectedError, Sa3Error, UsageError
from sa3_convert.runtime.audio import SampleFormat, audio_sha256, audio_writer, check_output_path, check_replaceable
from sa3_convert.runtime.batch_file import BatchItem, in_line
from sa3_convert.runtime.events import AudioChunk, Report, StageName
from sa3_convert.runtime.opening import Opening, adapters_told, held, made_by
from sa3_convert.runtime.output_checks import OutputCheck
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.setting_values import AUDIO
from sa3_convert.scheduling import Estimate, Runner
from sa3_convert.system.checked_files import inside
from sa3_convert.system.files import alone_in, sha256_file, sweep
from sa3_convert.system.sealed import fingerprint
from sa3_convert.system.supervisor import writing_into
from sa3_convert.system.untrusted import parse_json, read_bytes

RESULTS = "results.jsonl"
_LARGEST_RESULTS = 1 << 28


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What all generations of a batch share."""

    folder: Path
    sample_format: SampleFormat = "pcm16"
    dither: bool = False
    allow: tuple[str, ...] = ()
    metadata: Mapping[str, Any] | None = None
    """Written into every file, beside its settings."""
    adapted: Mapping[str, Any] | None = None
    """In its place, where adapters take part."""
    reads: tuple[Named, ...] = ()
    """What must not be written over, besides the audio that the batch itself names."""
    force: bool = False
    """Replace files that no batch of this folder has made."""

    def made_from(self, pipeline: Pipeline, item: BatchItem, sha256: Callable[[Path], str]) -> str | None:
        """Return a hash of all beside settings that decides a file's samples; None if given audio cannot be read."""
        told = self.told(pipeline, item, {})
        prompts = (item.request.prompt, item.request.negative_prompt)
        try:
            audio = [sha256(path) for path in item.request.audio_files()]
        except AudioError:
            return None
        return fingerprint(
            models=told.get("models"),
            engine=told.get("engine"),
            loras=[(one["sha256"], one["strength"]) for one in told.get("loras", ())],
            adapters=[one["sha256"] for one in told.get("adapters", ())],
            # What a tokenizer makes of them, which is no model.
            tokens=[None if prompt is None else pipeline.tokens(prompt).ids.tolist() for prompt in prompts],
            audio=audio,
            written=[self.sample_format, self.dither],
        )

    def told(self, pipeline: Pipeline, item: BatchItem, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the file of a generation tells of itself."""
        given = item.request.adapters
        models = (self.adapted if given else self.metadata) or {}
        return {**models, **adapters_told(pipeline, given), "request": request}


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of one generation; a line of `results.jsonl`."""

    line: int
    output: str
    request: Mapping[str, Any]
    """Its settings, every default filled in."""
    error: str | None = None
    """Why its output was rejected; then there is no file."""
    made_from: str | None = None
    """A hash of models, adapters, tokens, given audio and the way of writing; see `BatchOptions.made_from`."""
    file_sha256: str | None = None
    audio_sha256: str | None = None
    """Of the samples alone, which equal settings with different seeds must not share."""
    seconds: Mapping[StageName, float] | None = None
    warnings: tuple[str, ...] = ()
    reused: bool = False
    """Done by an earlier run."""
    exit_code: int = 0
    """What a command ends with because of it."""

    def to_json(self) -> dict[str, Any]:
        """Return the line's content."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("reused", "exit_code")}


@dataclass(frozen=True, slots=True)
class Line:
    """A generation that is to be made, here or on a worker."""

    item: BatchItem
    request: Mapping[str, Any]
    options: BatchOptions
    takes: Estimate
    made_from: str | None
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its number."""
        return str(self.item.line)

    def elsewhere(self) -> "Line":
        """Return the same for a process that may stand in another folder."""
        request = self.item.request
        paths: dict[str, Any] = {
            name: path.absolute() for name in AUDIO if isinstance(path := getattr(request, name), Path)
        }
        adapters = tuple(replace(one, path=one.path.absolute()) for one in request.adapters)
        item = replace(self.item, request=replace(request, **paths, adapters=adapters))
        return replace(self, item=item, options=replace(self.options, folder=self.options.folder.absolute()))


@dataclass(frozen=True, slots=True)
class Workers:
    """What makes the lines of a batch in place of this process; all see its folder, and what it reads."""

    runner: Runner
    opening: Opening


def run_batch(
    pipeline: Pipeline, items: Sequence[BatchItem], options: BatchOptions, workers: Workers | None = None
) -> Generator[BatchResult, None, None]:
    """Generate what is not done yet, and yield each result in order when its file and its line are written.

    A rejected output does not end the batch; its result says why. With workers no other error does, either: the result
    says why, and what a command ends with. Requests that do not suit the model are found before the first generation.
    """
    folder = options.folder
    settings = [_resolved(pipeline, item, folder) for item in items]
    for item in items:
        check_output_path(folder / item.output, options.sample_format)
    writes = [(f"Line {item.line}:", folder / item.output) for item in items]
    reads = [(f"line {item.line},", path) for item in items for path in item.request.files()]
    require_apart([*writes, ("The file of results", folder / RESULTS)], [*reads, *options.reads])
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone_in(folder))
        except BlockingIOError:
            raise UsageError(f"Another batch is writing into {folder}. Wait for it, or name another folder.") from None
        # What a link leads to may have changed until now.
        for name in (RESULTS, *(item.output for item in items)):
            _check_place(folder, name)
        recorded = _recorded(folder, {item.output for item in items})
        for item, request in zip(items, settings, strict=True):
            if item.output not in recorded and not options.force:
                with in_line(f"Line {item.line}", {}):
                    check_replaceable(folder / item.output, options.told(pipeline, item, request))
        found: dict[int, BatchResult] = {}
        adapters = any(item.request.adapters for item in items)
        memory = 0 if workers is None else workers.opening.memory_bytes(adapters=adapters)
        todo: list[Line] = []
        hashed = cache(audio_sha256)
        for item, request in zip(items, settings, strict=True):
            with in_line(f"Line {item.line}", {}):
                made_from = options.made_from(pipeline, item, hashed)
            known = recorded.get(item.output)
            wanted = {**request, "seed": known.request.get("seed")} if known and item.any_seed else request
            if (
                known is not None
                and made_from is not None
                and (known.request, known.made_from) == (wanted, made_from)
                and _is_whole(folder / item.output, known)
            ):
                found[item.line] = known
            else:
                todo.append(Line(item, request, options, Estimate(_seconds(request, memory), memory), made_from))
        outcomes = stack.enter_context(contextlib.closing(_made(pipeline, todo, workers)))
        yield from _in_order(items, found, outcomes, options)


def _in_order(
    items: Sequence[BatchItem],
    found: dict[int, BatchResult],
    outcomes: Iterator[BatchResult],
    options: BatchOptions,
) -> Iterator[BatchResult]:
    """Write down each result when it comes, and yield all, with those that were found, in the order of the file."""
    audio: dict[str, BatchResult] = {}
    for item in items:
        written = item.line in found
        while item.line not in found:
            result = next(outcomes)
            found[result.line] = result
            if result.line != item.line:
                # Its turn is later: what ends this process until then must not undo it.
                _append(options.folder / RESULTS, result)
        result = found[item.line]
        judged = result if result.reused else _judged(result, audio, options)
        if judged is not result or not written:
            _append(options.folder / RESULTS, judged)
        if judged.audio_sha256 is not None:
            audio.setdefault(judged.audio_sha256, judged)
        yield judged


def _made(pipeline: Pipeline, todo: Sequence[Line], workers: Workers | None) -> Generator[BatchResult, None, None]:
    """Yield what becomes of lines, each when it is made: one after the other here, or as workers have them."""
    if workers is None:
        yield from (_generate(pipeline, line) for line in todo)
        return
    if not todo:
        return
    folder = todo[0].options.folder
    # What a worker that died has left is removed at the end; if this process dies, by its parent.
    writing_into(folder)
    used = {bool(line.item.request.adapters) for line in todo}
    models = {adapters: made_by(pipeline, adapters=adapters) for adapters in used}
    run = partial(_generate_there, workers.opening.elsewhere(), models)
    try:
        with contextlib.closing(workers.runner([line.elsewhere() for line in todo], run)) as outcomes:
            for line, outcome in outcomes:
                yield _arrived(line, outcome, folder)
    finally:
        sweep(folder)


def _arrived(line: Line, outcome: "BatchResult | Sa3Error", folder: Path) -> BatchResult:
    if isinstance(outcome, BatchResult) and outcome.error is None and not _is_whole(folder / outcome.output, outcome):
        outcome = InputError(f"A worker has made it, and it is not in {folder} here: workers must see the same folder.")
    if isinstance(outcome, BatchResult):
        return outcome
    item = line.item
    return BatchResult(item.line, item.output, line.request, error=str(outcome), exit_code=outcome.exit_code)


def _generate_there(opening: Opening, models: Mapping[bool, Mapping[str, Any]], line: Line) -> BatchResult:
    """Generate where models stay loaded from one line to the next."""
    return _generate(held(opening, models), line)


def _judged(result: BatchResult, audio: Mapping[str, BatchResult], options: BatchOptions) -> BatchResult:
    """Return a result, or its rejection where an earlier line's seed has given the same audio."""
    same = audio.get(result.audio_sha256 or "")
    if same is None or same.request["seed"] == result.request["seed"]:
        return result
    try:
        OutputCheck(options.allow).duplicate(same.request["seed"], result.request["seed"])
    except OutputRejectedError as error:
        (options.folder / result.output).unlink(missing_ok=True)
        return BatchResult(result.line, result.output, result.request, error=str(error), exit_code=error.exit_code)
    return result


def _seconds(request: Mapping[str, Any], memory: int) -> float:
    """Return about how long a generation with models of this size takes on two cores: 0.1 s a step, second and GiB."""
    return 0.1 * (memory / 2**30) * float(request["steps"] or 1) * float(request["seconds"] or 1)


def _check_place(folder: Path, name: str) -> None:
    """Check that what is written under a name is a file of this folder, and no link leads out of it."""
    place = inside(folder, name)
    if place.exists() and not place.is_file():
        raise UsageError(f"{folder / name} is no regular file. Remove it, or name another folder.")


def _resolved(pipeline: Pipeline, item: BatchItem, folder: Path) -> dict[str, Any]:
    with in_line(f"Line {item.line}", item.called):
        if item.request.adapters:
            pipeline.slotted().adapters.open(item.request.adapters)
        return item.request.resolved(pipeline.layout).to_json(folder)


def _generate(pipeline: Pipeline, line: Line) -> BatchResult:
    with in_line(f"Line {line.item.line}", line.item.called):
        return _generated(pipeline, line)


def _generated(pipeline: Pipeline, line: Line) -> BatchResult:
    item, options, request = line.item, line.options, line.request
    path = options.folder / item.output
    digest = hashlib.sha256()
    report: Report | None = None
    try:
        with audio_writer(
            path,
            pipeline.layout.sample_rate,
            sample_format=options.sample_format,
            dither=options.dither,
            metadata=options.told(pipeline, item, request),
            loop=item.request.loop is not None,
        ) as writer:
            for event in pipeline.stream(item.request, allow=options.allow):
                if isinstance(event, AudioChunk):
                    writer.write(event.samples)
                    digest.update(event.samples.T.tobytes())
                elif isinstance(event, Report):
                    report = event
    except OutputRejectedError as error:
        # A file of an earlier run under this name was made from other settings.
        path.unlink(missing_ok=True)
        return BatchResult(item.line, item.output, request, error=str(error), exit_code=error.exit_code)
    assert report is not None
    return BatchResult(
        item.line,
        item.output,
        request,
        made_from=line.made_from,
        file_sha256=sha256_file(path),
        audio_sha256=digest.hexdigest(),
        seconds=dict(report.seconds),
        warnings=report.warnings,
    )


def _append(path: Path, result: BatchResult) -> None:
    with path.open("ab+") as stream:
        # A line that a killed run left half-written must not swallow this one.
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            stream.write(b"" if stream.read(1) == b"\n" else b"\n")
        stream.write(json.dumps(result.to_json(), ensure_ascii=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _recorded(folder: Path, outputs: AbstractSet[str]) -> dict[str, BatchResult]:
    """Return the results of earlier runs, by output."""
    try:
        lines = read_bytes(folder / RESULTS, _LARGEST_RESULTS).split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{folder / RESULTS} cannot be read: {error}") from None
    found = {result.output: result for result in map(_result, lines) if result is not None}
    return {output: found[output] for output in outputs & found.keys()}


def _result(line: bytes) -> BatchResult | None:
    """Read a line of `results.jsonl`; None where none can be read, so that its generation is made again."""
    try:
        # Half a line, from a run that was killed, or what somebody else has written.
        text = line.decode()
        parse_json(text)
        return replace(TypeAdapter(BatchResult).validate_json(text, strict=True), reused=True)
    except ValueError:
        return None


def _is_whole(path: Path, result: BatchResult) -> bool:
    try:
        return result.file_sha256 is not None and sha256_file(path) == result.file_sha256
    except OSError:
        return False
