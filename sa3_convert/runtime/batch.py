"""Many generations from one JSONL file: checked as a whole before the first, resumable after the last that was done.

Each line holds the settings of one generation as `GenerateRequest.from_json` reads them, paths relative to the batch
file, and optionally `output`, the name of its file. `results.jsonl` beside the files gets one line per generation that
was finished or rejected. A generation counts as done when such a line holds exactly its settings and its file is whole.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sa3_convert.bundle.overlap import Named, folded, require_apart
from sa3_convert.errors import InputError, OutputRejectedError, Sa3Error, SettingError, UsageError
from sa3_convert.runtime.audio import SampleFormat, audio_writer, check_output_path, check_replaceable
from sa3_convert.runtime.events import AudioChunk, Report, StageName
from sa3_convert.runtime.output_checks import OutputCheck
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest, located
from sa3_convert.runtime.setting_values import RANDOM
from sa3_convert.system.checked_files import inside
from sa3_convert.system.files import alone_in, sha256_file
from sa3_convert.system.untrusted import check_name, parse_json, read_bytes, read_text

RESULTS = "results.jsonl"
_LARGEST_RESULTS = 1 << 28
_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One generation of a batch."""

    line: int
    """In the batch file, from 1."""
    request: GenerateRequest
    output: str
    """File name within the batch's folder."""
    called: Mapping[str, str] = field(default_factory=dict)
    """What settings are called where they come from, if not by their own names."""
    any_seed: bool = False
    """Whether the seed was drawn, so that what another one made is as good."""


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What all generations of a batch share."""

    folder: Path
    sample_format: SampleFormat = "pcm16"
    dither: bool = False
    allow: tuple[str, ...] = ()
    metadata: Mapping[str, Any] | None = None
    """Written into every file, beside its settings."""
    reads: tuple[Named, ...] = ()
    """What must not be written over, besides the audio that the batch itself names."""
    force: bool = False
    """Replace files that no batch of this folder has made."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of one generation; a line of `results.jsonl`."""

    line: int
    output: str
    request: Mapping[str, Any]
    """Its settings, every default filled in."""
    error: str | None = None
    """Why its output was rejected; then there is no file."""
    file_sha256: str | None = None
    audio_sha256: str | None = None
    """Of the samples alone, which equal settings with different seeds must not share."""
    seconds: Mapping[StageName, float] | None = None
    warnings: tuple[str, ...] = ()
    reused: bool = False
    """Done by an earlier run."""

    def to_json(self) -> dict[str, Any]:
        """Return the line's content."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "reused"}


def read_batch(
    path: Path, defaults: Mapping[str, Any] | None = None, called: Mapping[str, str] | None = None
) -> list[BatchItem]:
    """Read a JSONL file of generations, and check every line of it.

    Args:
        path: the file.
        defaults: stand for what a line does not set.
        called: what errors call a default; a line's own settings have their names.

    Raises:
        InputError: the file cannot be read, is empty, or a line is no JSON object.
        UsageError: a line's settings cannot be; it is named.

    """
    try:
        # Other characters that break lines may stand in a prompt.
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    given = (defaults or {}, called or {})
    items = [_read_line(path, number, text, *given) for number, text in enumerate(lines, 1) if text.strip()]
    if not items:
        raise InputError(f"{path} holds no generation. Write one JSON object with a prompt per line.")
    seen: dict[str, int] = {}
    for item in items:
        # Some file systems take two spellings of a name for one.
        first = seen.setdefault(folded(item.output), item.line)
        if first != item.line:
            raise UsageError(f"{path}: lines {first} and {item.line} both write {item.output!r}.")
    return items


def _read_line(path: Path, number: int, text: str, defaults: Mapping[str, Any], called: Mapping[str, str]) -> BatchItem:
    where = f"{path}, line {number}"
    try:
        values = parse_json(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} is no JSON object.")
    output = values.pop("output", f"{number:04d}.wav")
    called = {name: called[name] for name in defaults.keys() & called.keys() - values.keys()}
    with _in_line(where, called):
        if not isinstance(output, str) or Path(output).name != output or output.startswith("."):
            raise UsageError(f"output is {output!r}, expected a plain file name.")
        if len(os.fsencode(output)) > _LONGEST_NAME:
            raise UsageError(f"output is a name of more than {_LONGEST_NAME} bytes.")
        check_name(Path(output))
        check_output_path(Path(output), "pcm16")
        settings = {**defaults, **located(values, path.parent)}
        return BatchItem(number, GenerateRequest.from_json(settings), output, called, settings.get("seed") == RANDOM)


@contextlib.contextmanager
def _in_line(where: str, called: Mapping[str, str]) -> Iterator[None]:
    """Name the line in an error."""
    try:
        yield
    except SettingError as error:
        raise UsageError(f"{where}: {error.told(called)}") from None
    except Sa3Error as error:
        raise type(error)(f"{where}: {error}") from None


def run_batch(pipeline: Pipeline, items: Sequence[BatchItem], options: BatchOptions) -> Iterator[BatchResult]:
    """Generate what is not done yet, and yield each result when its file and its line are written.

    A rejected output does not end the batch; its result says why. Requests that do not suit the model are found before
    the first generation.
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
                with _in_line(f"Line {item.line}", {}):
                    check_replaceable(folder / item.output, {**(options.metadata or {}), "request": request})
        done = {output: found for output, found in recorded.items() if _is_whole(folder / output, found)}
        audio: dict[str, BatchResult] = {}
        for item, request in zip(items, settings, strict=True):
            found = done.get(item.output)
            wanted = {**request, "seed": found.request.get("seed")} if found and item.any_seed else request
            if found is not None and found.request == wanted:
                result = found
            else:
                with _in_line(f"Line {item.line}", item.called):
                    result = _generate(pipeline, item, request, options, audio)
                _append(folder / RESULTS, result)
            if result.audio_sha256 is not None:
                audio.setdefault(result.audio_sha256, result)
            yield result


def _check_place(folder: Path, name: str) -> None:
    """Check that what is written under a name is a file of this folder, and no link leads out of it."""
    place = inside(folder, name)
    if place.exists() and not place.is_file():
        raise UsageError(f"{folder / name} is no regular file. Remove it, or name another folder.")


def _resolved(pipeline: Pipeline, item: BatchItem, folder: Path) -> dict[str, Any]:
    with _in_line(f"Line {item.line}", item.called):
        return item.request.resolved(pipeline.layout).to_json(folder)


def _generate(
    pipeline: Pipeline,
    item: BatchItem,
    request: dict[str, Any],
    options: BatchOptions,
    audio: Mapping[str, BatchResult],
) -> BatchResult:
    path = options.folder / item.output
    digest = hashlib.sha256()
    report: Report | None = None
    metadata = {**(options.metadata or {}), "request": request}
    try:
        with audio_writer(
            path,
            pipeline.layout.sample_rate,
            sample_format=options.sample_format,
            dither=options.dither,
            metadata=metadata,
            loop=item.request.loop is not None,
        ) as writer:
            for event in pipeline.stream(item.request, allow=options.allow):
                if isinstance(event, AudioChunk):
                    writer.write(event.samples)
                    digest.update(event.samples.T.tobytes())
                elif isinstance(event, Report):
                    report = event
            same = audio.get(digest.hexdigest())
            if same is not None and same.request["seed"] != request["seed"]:
                OutputCheck(options.allow).duplicate(same.request["seed"], request["seed"])
    except OutputRejectedError as error:
        # A file of an earlier run under this name was made from other settings.
        path.unlink(missing_ok=True)
        return BatchResult(item.line, item.output, request, error=str(error))
    assert report is not None
    return BatchResult(
        item.line,
        item.output,
        request,
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
