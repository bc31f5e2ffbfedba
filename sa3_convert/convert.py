"""Checkpoint → bundle: export, passes, MNN, audit, verify; each stage only when what it depends on has changed.

A model reaches its final name only after its file was audited, loaded, run and found close enough; the manifest is
written last. A process that is killed leaves a bundle that is either the old one or refused by its own manifest, and
the next run completes it from the stages that were finished.
"""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sa3_convert.assemble import assemble
from sa3_convert.bundle.manifest import MANIFEST, Bundle
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.existing import ORT_INT8_FOLDER, REFERENCE_FOLDER
from sa3_convert.files import inside, sweep
from sa3_convert.log import kept, note
from sa3_convert.plan import Plan, Step, plan
from sa3_convert.request import ConvertRequest
from sa3_convert.stage_cache import CachedResult, Notes, StageCache
from sa3_convert.stages import (
    PLANNED,
    Stage,
    export_stage,
    mnn_stage,
    ort_int8_stage,
    round_stage,
    split_stage,
    verify_stage,
)


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
