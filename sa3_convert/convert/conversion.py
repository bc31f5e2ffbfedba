"""Checkpoint → bundle: each stage only when what it depends on has changed, then the bundle, its manifest last."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sa3_convert.bundle.manifest import (
    COMPANIONS,
    MANIFEST,
    TOKEN_TABLE,
    TOKENIZER,
    Artifact,
    ArtifactKind,
    FileEntry,
)
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component, part_files
from sa3_convert.convert.cache import CachedResult, StageCache
from sa3_convert.convert.existing import SHARED, manifest_of, shared_text
from sa3_convert.convert.plan import ComponentPlan, ConversionPlan, ConvertRequest, plan
from sa3_convert.convert.stages import STAGES, STAGES_OF, ComponentJob
from sa3_convert.errors import ConversionError, UsageError
from sa3_convert.system.checked_files import inside
from sa3_convert.system.files import alone_in, atomic_path, copy_file, sweep, write_text
from sa3_convert.system.log import note

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint


def assemble(request: ConvertRequest, plan: ConversionPlan) -> Bundle:
    """Put the files in place that the plan says, from the results of its stages, the manifest last."""
    artifacts = [*plan.kept, *(_artifact(request, step, kind) for step in plan.steps for kind in step.place)]
    artifacts += [_shared_artifact(request, kind) for kind in plan.shared]
    order = list(Component)
    artifacts.sort(key=lambda a: (order.index(a.component) if a.component else len(order), a.kind))
    bundle = Bundle(request.out, manifest_of(request, artifacts))
    bundle.write()
    return bundle


def _artifact(request: ConvertRequest, step: ComponentPlan, kind: ArtifactKind) -> Artifact:
    """Put a component's file where the plan says, what is loaded with it too, and return what the manifest says."""
    makers = [STAGES[name] for name in STAGES_OF[kind]]
    stage, result = makers[0], step.job.results[makers[0].name]
    name = stage.leaves[kind].format(step.component.value)
    in_cache = request.in_cache(stage)
    own_weights = name + COMPANIONS[kind]
    parts = [file for file in part_files(step.component, name) if file in result.files]
    entries: dict[str, FileEntry] = {}
    for file in (name, own_weights, *parts):
        place = Path(stage.folder, file).as_posix()
        if file in result.files:
            size = result.file(file).stat().st_size
            entries[file] = FileEntry(path=place, sha256=result.files[file], bytes=size)
            if not in_cache:
                copy_file(result.file(file), _own(request.out, place))
        elif not in_cache:
            # Of an earlier, larger model: it would be found by its name.
            (request.out / place).unlink(missing_ok=True)
    notes = {key: value for maker in makers for key, value in step.job.results[maker.name].notes}
    return Artifact(
        **dict(entries[name]),
        companion=entries.get(own_weights),
        parts=tuple(entries[file] for file in parts),
        kept_at=_from(request.out, result.folder) if in_cache else None,
        kind=kind,
        component=step.component,
        fingerprint=step.keys[makers[-1].name],
        **{key: value for key, value in notes.items() if key in Artifact.model_fields},
    )


def _from(out: Path, folder: Path) -> str:
    """Return the way from the bundle to a folder of the cache; on Windows there is none to another drive."""
    try:
        return Path(os.path.relpath(folder, out)).as_posix()
    except ValueError:
        return folder.absolute().as_posix()


def _own(out: Path, name: str) -> Path:
    """Return where a file of the bundle is written: a link that someone put there is not followed out of it."""
    inside(out, name)
    return out / name


def _shared_artifact(request: ConvertRequest, kind: ArtifactKind) -> Artifact:
    """Write what a client needs beside the models."""
    text = shared_text(request, kind)
    write_text(_own(request.out, SHARED[kind]), bottleneck_params(request.checkpoint) if text is None else text)
    table = _token_table(request.out) if kind == "tokenizer" else None
    return Artifact(**dict(FileEntry.of(request.out, SHARED[kind])), kind=kind, table=table)


def _token_table(out: Path) -> FileEntry | None:
    """Write the table of the tokenizer that stands in a bundle; None, and a line in the log, where it can have none."""
    from sa3_convert.runtime.prompts import table_of
    from sa3_convert.runtime.token_table import NoTableError

    try:
        content = table_of(out / TOKENIZER)
    except NoTableError as error:
        note("tokenizer", [f"{TOKENIZER} gets no {TOKEN_TABLE}, because {error}; it loads more slowly."])
        (out / TOKEN_TABLE).unlink(missing_ok=True)
        return None
    with atomic_path(_own(out, TOKEN_TABLE)) as path:
        path.write_bytes(content)
    return FileEntry.of(out, TOKEN_TABLE)


def bottleneck_params(checkpoint: "Checkpoint") -> str:
    """Return `bottleneck_params.json` as clients read it: nested lists [1][C][1], and running_std as [value]."""
    state = checkpoint.state(Component.DECODER)
    names = ("scaling_factor", "bias", "running_std")
    values = {name: state[f"bottleneck.{name}"].tolist() for name in names}
    if any(not v for v in values.values()):
        raise ConversionError("The checkpoint's bottleneck is empty.")
    return json.dumps(values) + "\n"


@dataclass(frozen=True, slots=True)
class StageEvent:
    """Something that the user may want to see happen."""

    component: Component
    stage: str
    state: Literal["started", "working", "done", "reused"]
    seconds: float = 0.0
    """It took, or, while it works, it will still take; 0 where nobody knows yet."""
    detail: str = ""


Report = Callable[[StageEvent], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The bundle, and whether anything had to be done."""

    bundle: Bundle
    up_to_date: bool


def convert(
    request: ConvertRequest, report: Report, planned: Callable[[ConversionPlan], None] = lambda _: None
) -> Outcome:
    """Make or complete the bundle at `request.out`: work out what has to be done, and do that.

    Args:
        request: what is asked for.
        report: told about each stage.
        planned: told what will be done, before it is.

    Raises:
        CheckpointError: the checkpoint's values are not usable.
        ConversionError: a stage failed or its file does not hold what the recipe asks for.
        VerificationError: a model is below the recipe's floor; nothing of it stands under a final name.
        InputError: disk or memory do not have room for it.
        UsageError: another bundle stands at `out`, or another conversion into it is running.

    """
    found, todo = _manifest(request.out), plan(request)
    request.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone_in(request.out))
        except BlockingIOError:
            raise UsageError(
                f"Another conversion into {request.out} is running. Wait for it, or give another --out."
            ) from None
        if _manifest(request.out) != found:
            # Another conversion has ended since.
            todo = plan(request)
        cache = StageCache(request.cache)
        # What a conversion that was killed has left.
        for folder in {request.out / stage.folder for stage in STAGES.values()}:
            sweep(folder)
        cache.sweep()
        planned(todo)
        if todo.existing is not None and todo.up_to_date:
            return Outcome(todo.existing, up_to_date=True)
        for step in todo.steps:
            _run_stages(request, cache, step, report)
        return Outcome(assemble(request, todo), up_to_date=False)


def _manifest(out: Path) -> bytes | None:
    try:
        return (out / MANIFEST).read_bytes()
    except OSError:
        return None


def _run_stages(request: ConvertRequest, cache: StageCache, step: ComponentPlan, report: Report) -> None:
    """Run the stages of a component that the plan says; their results and those that were there go into its job."""
    for name, key in step.keys.items():
        if name in step.found:
            step.job.results[name] = found = step.found[name]
            note("kept", found.notes.log)
            report(StageEvent(step.component, name, "reused", detail=found.notes.detail))
        elif name in step.todo:
            report(StageEvent(step.component, name, "started"))
            started = time.perf_counter()
            made = make_stage(step.job, name, key, cache, _told(report, step.component, name), again=request.force)
            report(StageEvent(step.component, name, "done", time.perf_counter() - started, made.notes.detail))


def make_stage(
    job: ComponentJob, stage: str, key: str, cache: StageCache, tell: Callable[[int, int], None], *, again: bool = False
) -> CachedResult[Any]:
    """Make a stage's result, which the cache and the job get, from the parts that an interrupted run has left.

    Args:
        job: the component; what the stage reads is among its results.
        stage: its name.
        key: its fingerprint.
        cache: keeps result and parts.
        tell: told how many parts are done, and of how many.
        again: use no parts, and take the place of what is kept.

    """
    if again:
        cache.forget(key)
    job.parts = cache.parts(key, tell)
    made = cache.make(stage, key, partial(STAGES[stage].make, job), replace=again)
    cache.forget(key)
    job.results[stage] = made
    return made


def _told(report: Report, component: Component, stage: str) -> Callable[[int, int], None]:
    """Return what a stage tells how many of its parts are done: what is left takes as long for each as the last did."""
    last: list[float] = []

    def tell(done: int, total: int) -> None:
        last.append(time.perf_counter())
        left = (last[-1] - last[-2]) * (total - done) if done and len(last) > 1 else 0.0
        report(StageEvent(component, stage, "working", left, f"{done} of {total}"))

    return tell
