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

from sa3_convert.assemble import ORT_INT8_FOLDER, REFERENCE_FOLDER, Made, assemble, lora_entries, of_other_weights
from sa3_convert.bundle.manifest import BOTTLENECK, MANIFEST, RECIPE, SPLIT_KINDS, TOKENIZER, Bundle
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, UsageError
from sa3_convert.log import kept, note
from sa3_convert.request import ConvertRequest
from sa3_convert.stage_cache import CachedResult, StageCache
from sa3_convert.stages import (
    PLANNED,
    Keys,
    Stage,
    export_stage,
    mnn_stage,
    ort_int8_stage,
    round_stage,
    split_names,
    split_stage,
    verify_stage,
)
from sa3_convert.tools import tool_versions


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


def convert(request: ConvertRequest, report: Report) -> Outcome:
    """Make or complete the bundle at `request.out`.

    Raises:
        CheckpointError: the checkpoint's values are not usable.
        ConversionError: a stage failed or its file does not hold what the recipe asks for.
        VerificationError: a model is below the recipe's floor; nothing of it stands under a final name.
        UsageError: another bundle stands at `out`, or another conversion into it is running.

    """
    selected = request.selected()
    for component in selected:
        request.recipe.for_component(component)
    existing = _existing_bundle(request)
    if existing is not None and not request.force and (others := of_other_weights(existing, request)):
        names = ", ".join(c.value for c in others)
        raise UsageError(
            f"{names} in {request.out} would stay, but came from other weights or other LoRAs than this checkpoint's. "
            "Convert them too (leave --component away), give another --out, or --force to drop them."
        )
    request.out.mkdir(parents=True, exist_ok=True)
    with _lock(request.out):
        _sweep(request)
        keys = {c: request.keys(c) for c in selected}
        if existing is not None and not request.force and is_up_to_date(existing, request, keys):
            return Outcome(existing, up_to_date=True)
        cache = StageCache(request.cache)
        made = {c: _make_component(request, cache, c, keys[c], report) for c in selected}
        bundle = assemble(request, existing, keys, made)
    return Outcome(bundle, up_to_date=False)


def is_up_to_date(bundle: Bundle, request: ConvertRequest, keys: Mapping[Component, Keys]) -> bool:
    """Tell whether a bundle's files are whole and were made from exactly this."""
    manifest = bundle.manifest
    if manifest.recipe != request.recipe.name or manifest.tools != tool_versions():
        return False
    if manifest.loras != lora_entries(request.checkpoint):
        return False
    present = {(a.component, a.kind): a for a in bundle.manifest.artifacts}
    for component, key in keys.items():
        if component not in bundle.components or bundle.artifact(component).fingerprint != key.verify:
            return False
        int8 = present.get((component, "onnx-int8"))
        if key.ort_int8 is not None and (int8 is None or int8.fingerprint != key.ort_int8):
            return False
        split = present.get((component, "mnn-step"))
        if key.split is not None and (split is None or split.fingerprint != key.split):
            return False
        kept = [a for a in (bundle.artifact(component, "onnx"), int8) if a is not None]
        if any((a.kept_at is None) != request.with_reference for a in kept):
            return False
    try:
        bundle.check(tuple(keys), kinds=("mnn", "onnx", "onnx-int8", *SPLIT_KINDS))
    except BundleError:
        return False
    return True


def _existing_bundle(request: ConvertRequest) -> Bundle | None:
    """Return the bundle that stands at `out` if it can be completed; a damaged one is made anew."""
    out = request.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a folder.")
    if not (out / MANIFEST).exists():
        leftovers = [p.name for p in out.iterdir() if not p.name.startswith(".")] if out.exists() else []
        known = {RECIPE, TOKENIZER, BOTTLENECK, REFERENCE_FOLDER, ORT_INT8_FOLDER}
        models = {name for c in Component for name in (f"{c.value}.mnn", *split_names(c))}
        known |= {f"{name}{suffix}" for name in models for suffix in ("", ".weight")}
        foreign = sorted(set(leftovers) - known)
        if foreign and not request.force:
            raise UsageError(
                f"--out {out} holds other files ({foreign[0]}, …). Give an empty folder, or --force to write into it."
            )
        return None
    try:
        bundle = Bundle.open(out)
    except BundleError:
        return None
    wanted = (request.checkpoint.variant_name, request.recipe.name)
    found = (bundle.manifest.variant, bundle.manifest.recipe)
    if found != wanted and not request.force:
        raise UsageError(
            f"{out} holds a bundle of {found[0]} with recipe {found[1]!r}; this would replace it by {wanted[0]} with "
            f"{wanted[1]!r}. Give another --out, or --force."
        )
    return bundle if found == wanted else None


def _sweep(request: ConvertRequest) -> None:
    """Remove what a conversion that was killed has left; the lock says that none is writing into the bundle."""
    for leftover in request.out.rglob(".*.partial"):
        leftover.unlink(missing_ok=True)
    StageCache(request.cache).sweep()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder against a second conversion; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"Another conversion into {folder} is running. Wait for it, or give another --out."
            ) from None
        yield


def _make_component(
    request: ConvertRequest, cache: StageCache, component: Component, keys: Keys, report: Report
) -> Made:
    recipe = request.recipe.for_component(component)

    def staged(stage: Stage, key: str, make: Callable[[Path], dict[str, Any]]) -> CachedResult:
        report(StageEvent(component, stage, "started"))
        started = time.perf_counter()
        if request.force:
            cache.drop(stage, key)

        def keeping(folder: Path) -> dict[str, Any]:
            with kept() as lines:
                notes = make(folder)
            return notes | {"log": lines}

        result, reused = cache.get(stage, key, keeping)
        if reused:
            note("kept", result.notes.get("log", ()))
        seconds = time.perf_counter() - started
        report(StageEvent(component, stage, "reused" if reused else "done", seconds, result.notes.get("detail", "")))
        return result

    export = staged("export", keys.export, lambda folder: export_stage(request.checkpoint, component, folder))
    reference = export.file(f"{component.value}.onnx")
    planned: Path | None = None
    if keys.round is not None:
        rounded = staged(
            "round",
            keys.round,
            lambda folder: round_stage(request.checkpoint, component, recipe, folder, request.threads),
        )
        planned = rounded.file(PLANNED)
    mnn = staged(
        "mnn",
        keys.mnn,
        lambda folder: mnn_stage(reference, component, recipe, planned, folder, request.target_of(component)),
    )
    target = mnn.file(f"{component.value}.mnn")
    layout, threads = request.checkpoint.layout, request.threads
    verify = staged(
        "verify", keys.verify, lambda _: verify_stage(reference, target, component, recipe, layout, threads)
    )
    int8: CachedResult | None = None
    if keys.ort_int8 is not None:
        int8 = staged(
            "ort-int8", keys.ort_int8, lambda folder: ort_int8_stage(reference, component, layout, folder, threads)
        )
    split: CachedResult | None = None
    if keys.split is not None:
        split = staged(
            "split",
            keys.split,
            lambda folder: split_stage(
                reference, component, recipe, planned, layout, folder, threads, request.target_of(component)
            ),
        )
    return Made(export, mnn, verify, int8, split)
