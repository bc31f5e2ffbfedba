"""Checkpoint → bundle: each stage only when what it depends on has changed, then the bundle, its manifest last."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sa3_convert.bundle.manifest import (
    MANIFEST,
    SPLIT_KINDS,
    Artifact,
    ArtifactKind,
    CheckpointOrigin,
    FileEntry,
    Manifest,
    as_text,
)
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component
from sa3_convert.convert.cache import CachedResult, Notes, StageCache
from sa3_convert.convert.existing import (
    ORT_INT8_FOLDER,
    REFERENCE_FOLDER,
    SHARED,
    checkpoint_digests,
    lora_entries,
    shared_text,
)
from sa3_convert.convert.plan import Plan, Step, plan
from sa3_convert.convert.stages import (
    PLANNED,
    ConvertRequest,
    Stage,
    export_stage,
    mnn_stage,
    ort_int8_stage,
    round_stage,
    split_names,
    split_stage,
    verify_stage,
)
from sa3_convert.errors import ConversionError, UsageError
from sa3_convert.system.checked_files import inside
from sa3_convert.system.files import copy_file, sweep, write_text
from sa3_convert.system.log import kept, note
from sa3_convert.system.machine import tool_versions

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

Results = Mapping[Stage, CachedResult[Any]]


def assemble(request: ConvertRequest, plan: Plan, results: Mapping[Component, Results]) -> Bundle:
    """Put the files in place that the plan says, the manifest last."""
    artifacts = list(plan.kept)
    for step in plan.steps:
        artifacts += _component_artifacts(request, step, results[step.component])
    artifacts += [_shared_artifact(request, kind) for kind in plan.shared]
    order = list(Component)
    artifacts.sort(key=lambda a: (order.index(a.component) if a.component else len(order), a.kind))
    manifest = Manifest(
        schema_version=1,
        variant=request.checkpoint.variant_name,
        recipe=request.recipe.name,
        checkpoint=CheckpointOrigin(
            source=as_text(request.checkpoint.layout.source_id or request.checkpoint.folder.name),
            digests=checkpoint_digests(request),
        ),
        loras=lora_entries(request.checkpoint),
        tools=tool_versions(),
        layout=request.checkpoint.layout,
        artifacts=tuple(artifacts),
    )
    bundle = Bundle(request.out, manifest)
    bundle.write()
    return bundle


def _component_artifacts(request: ConvertRequest, step: Step, results: Results) -> Iterator[Artifact]:
    component, name = step.component, f"{step.component.value}.mnn"
    recipe = request.recipe.for_component(component)
    for kind in step.place:
        if kind == "mnn":
            yield Artifact(
                **_placed(request, results["mnn"], name),
                kind=kind,
                component=component,
                precision=recipe.precision,
                storage=results["mnn"].notes.storage,
                fidelity=results["verify"].notes.fidelity,
                floor_db=recipe.floor_db,
                target_mnn=request.target_of(component),
                fingerprint=step.keys["verify"],
            )
        elif kind == "onnx":
            yield Artifact(
                **_kept(request, results["export"], component, REFERENCE_FOLDER),
                kind=kind,
                component=component,
                precision="fp32",
                fingerprint=step.keys["export"],
            )
        elif kind == "onnx-int8":
            notes = results["ort-int8"].notes
            yield Artifact(
                **_kept(request, results["ort-int8"], component, ORT_INT8_FOLDER),
                kind=kind,
                component=component,
                precision=notes.precision,
                fidelity=notes.fidelity,
                floor_db=notes.floor_db,
                fingerprint=step.keys["ort-int8"],
            )
        else:
            yield Artifact(
                **_placed(request, results["split"], split_names(component)[SPLIT_KINDS.index(kind)]),
                kind=kind,
                component=component,
                precision=recipe.precision,
                fidelity=results["split"].notes.fidelity,
                floor_db=recipe.floor_db,
                fingerprint=step.keys["split"],
            )


def _placed(request: ConvertRequest, result: CachedResult[Any], name: str) -> dict[str, Any]:
    """Put a `.mnn` into the bundle, with its file of weights if it has one; return how the manifest describes both."""
    mnn, weights = _entries(result, name, f"{name}.weight", "")
    for entry in filter(None, (mnn, weights)):
        copy_file(result.file(entry.path), _own(request.out, entry.path))
    if weights is None:
        # Of an earlier, larger model: MNN finds it by its name.
        (request.out / f"{name}.weight").unlink(missing_ok=True)
    return dict(mnn) | {"companion": weights}


def _kept(request: ConvertRequest, result: CachedResult[Any], component: Component, folder: str) -> dict[str, Any]:
    """Return how the manifest describes an ONNX that stays in the cache, or is copied if the bundle shall hold it."""
    name = component.value
    onnx, data = _entries(result, f"{name}.onnx", f"{name}.onnx.data", f"{folder}/")
    if request.with_reference:
        for entry in filter(None, (onnx, data)):
            copy_file(result.file(Path(entry.path).name), _own(request.out, entry.path))
    kept_at = None if request.with_reference else os.path.relpath(result.folder, request.out)
    return dict(onnx) | {"companion": data, "kept_at": kept_at}


def _own(out: Path, name: str) -> Path:
    """Return where a file of the bundle is written: a link that someone put there is not followed out of it."""
    inside(out, name)
    return out / name


def _entries(result: CachedResult[Any], main: str, companion: str, folder: str) -> tuple[FileEntry, FileEntry | None]:
    found = [
        FileEntry(path=folder + file, sha256=result.files[file], bytes=result.file(file).stat().st_size)
        for file in (main, companion)
        if file in result.files
    ]
    return found[0], found[1] if len(found) > 1 else None


def _shared_artifact(request: ConvertRequest, kind: ArtifactKind) -> Artifact:
    """Write what a client needs beside the models."""
    text = shared_text(request, kind)
    write_text(_own(request.out, SHARED[kind]), bottleneck_params(request.checkpoint) if text is None else text)
    return Artifact(**dict(FileEntry.of(request.out, SHARED[kind])), kind=kind)


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
    stage: Stage
    state: Literal["started", "done", "reused"]
    seconds: float = 0.0
    detail: str = ""


Report = Callable[[StageEvent], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The bundle, and whether anything had to be done."""

    bundle: Bundle
    up_to_date: bool


def convert(request: ConvertRequest, report: Report, planned: Callable[[Plan], None] = lambda _: None) -> Outcome:
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
    for component in request.selected():
        request.recipe.for_component(component)
    found, todo = _manifest(request.out), plan(request)
    request.out.mkdir(parents=True, exist_ok=True)
    with _lock(request.out):
        if _manifest(request.out) != found:
            # Another conversion has ended since.
            todo = plan(request)
        cache = StageCache(request.cache)
        _sweep(request.out, cache)
        planned(todo)
        if todo.existing is not None and todo.up_to_date:
            return Outcome(todo.existing, up_to_date=True)
        results = {step.component: _make_component(request, cache, step, report) for step in todo.steps}
        return Outcome(assemble(request, todo, results), up_to_date=False)


def _manifest(out: Path) -> bytes | None:
    try:
        return (out / MANIFEST).read_bytes()
    except OSError:
        return None


def _sweep(out: Path, cache: StageCache) -> None:
    """Remove what a conversion that was killed has left."""
    for folder in (out, out / REFERENCE_FOLDER, out / ORT_INT8_FOLDER):
        sweep(folder)
    cache.sweep()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder against a second conversion; the lock goes with the process, however it ends."""
    inside(folder, ".lock")
    with (folder / ".lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"Another conversion into {folder} is running. Wait for it, or give another --out."
            ) from None
        yield


def _make_component(
    request: ConvertRequest, cache: StageCache, step: Step, report: Report
) -> Mapping[Stage, CachedResult[Any]]:
    """Run the stages of a component that the plan says, and return their results with those that were there."""
    results: dict[Stage, CachedResult[Any]] = {}
    makers = _makers(request, step.component, results)
    for stage, key in step.keys.items():
        if stage in step.found:
            results[stage] = step.found[stage]
            note("kept", results[stage].notes.log)
            report(StageEvent(step.component, stage, "reused", detail=results[stage].notes.detail))
        elif stage in step.todo:
            report(StageEvent(step.component, stage, "started"))
            started = time.perf_counter()
            results[stage] = cache.make(stage, key, _logged(makers[stage]), replace=request.force)
            seconds = time.perf_counter() - started
            report(StageEvent(step.component, stage, "done", seconds, results[stage].notes.detail))
    return results


def _logged(make: Callable[[Path], Notes]) -> Callable[[Path], Notes]:
    """Return a maker whose notes also tell what was logged while it ran."""

    def making(folder: Path) -> Notes:
        with kept() as lines:
            notes = make(folder)
        return notes.model_copy(update={"log": tuple(lines)})

    return making


def _makers(
    request: ConvertRequest, component: Component, results: Mapping[Stage, CachedResult[Any]]
) -> Mapping[Stage, Callable[[Path], Notes]]:
    """Return what makes each stage's result in a folder; each is called when the results that it reads are there."""
    checkpoint, threads, layout = request.checkpoint, request.threads, request.checkpoint.layout
    recipe, target_mnn = request.recipe.for_component(component), request.target_of(component)

    def reference() -> Path:
        return results["export"].file(f"{component.value}.onnx")

    def rounded() -> Path | None:
        return results["round"].file(PLANNED) if "round" in results else None

    def target() -> Path:
        return results["mnn"].file(f"{component.value}.mnn")

    return {
        "export": lambda folder: export_stage(checkpoint, component, folder),
        "round": lambda folder: round_stage(checkpoint, component, recipe, folder, threads),
        "mnn": lambda folder: mnn_stage(reference(), component, recipe, rounded(), folder, target_mnn),
        "verify": lambda _: verify_stage(reference(), target(), component, recipe, layout, threads),
        "ort-int8": lambda folder: ort_int8_stage(reference(), component, layout, folder, threads),
        "split": lambda folder: split_stage(
            reference(), component, recipe, rounded(), layout, folder, threads, target_mnn
        ),
    }
