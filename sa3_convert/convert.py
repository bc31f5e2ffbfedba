"""Checkpoint → bundle: export, passes, MNN, audit, verify; each stage only when what it depends on has changed.

A model reaches its final name only after its file was audited, loaded, run and found close enough; the manifest is
written last. A process that is killed leaves a bundle that is either the old one or refused by its own manifest, and
the next run completes it from the stages that were finished.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sa3_convert.bundle.manifest import (
    BOTTLENECK,
    MANIFEST,
    RECIPE,
    SPLIT_KINDS,
    TOKENIZER,
    Artifact,
    Bundle,
    Fidelity,
    FileEntry,
    LoraEntry,
    Manifest,
)
from sa3_convert.checkpoint.layout import TEXT_ENCODER_FOLDER
from sa3_convert.components import Component, components_of
from sa3_convert.errors import BundleError, ConversionError, UsageError
from sa3_convert.files import atomic_path, link_or_copy, write_text
from sa3_convert.mnn.target import DEFAULT_TARGET, MnnVersion
from sa3_convert.recipe import Recipe
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
    stage_keys,
    verify_stage,
)
from sa3_convert.tools import tool_versions

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

REFERENCE_FOLDER = "reference"
"""Where a bundle keeps its reference ONNX files."""
ORT_INT8_FOLDER = "onnxruntime-int8"
"""Where a bundle keeps what ONNX Runtime computes with integers."""


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
class ConvertRequest:
    """What to convert, how, and to where."""

    checkpoint: "Checkpoint"
    recipe: Recipe
    out: Path
    cache: Path
    components: tuple[Component, ...] = ()
    """Empty means all that the checkpoint has."""
    force: bool = False
    """Redo everything, and replace a bundle that was made from something else."""
    with_reference: bool = False
    """Copy the reference ONNX files into the bundle instead of leaving them in the cache."""
    with_ort_int8: bool = False
    """Also make what the engine `onnxruntime-int8` runs; it is kept where the reference is."""
    target_mnn: MnnVersion = DEFAULT_TARGET
    """The oldest MNN that the result has to be right on."""
    with_split_dit: bool = False
    """Also make the DiT in two parts, of which one runs once per generation."""
    threads: int | None = None

    def keys(self, component: Component) -> Keys:
        """Return the fingerprints of a component's stages."""
        recipe = self.recipe.for_component(component)
        return stage_keys(
            self.checkpoint,
            component,
            recipe,
            target_mnn=self.target_mnn,
            ort_int8=self.with_ort_int8,
            split=self.with_split_dit,
        )

    def selected(self) -> tuple[Component, ...]:
        """Return the components to convert, in pipeline order.

        Raises:
            UsageError: the checkpoint has no such component.

        """
        available = components_of(self.checkpoint.layout)
        for component in self.components:
            if component not in available:
                have = ", ".join(c.value for c in available)
                raise UsageError(f"This checkpoint has no component {component.value!r}; it has {have}.")
        return tuple(c for c in available if not self.components or c in self.components)


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
    if existing is not None and not request.force and (others := _of_other_weights(existing, request)):
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
        bundle = _assemble(request, existing, keys, made)
    return Outcome(bundle, up_to_date=False)


def _of_other_weights(bundle: Bundle, request: ConvertRequest) -> list[Component]:
    """Return the components of a bundle that are not converted now and were not made from this checkpoint's weights."""
    digests, selected = bundle.manifest.checkpoint.get("digests", {}), request.selected()
    return [
        component
        for component in bundle.components
        if component not in selected and digests.get(component.value) != request.checkpoint.digest(component)
    ]


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


def lora_entries(checkpoint: "Checkpoint") -> tuple[LoraEntry, ...]:
    """Return what the manifest says of a checkpoint's adapters."""
    return tuple(
        LoraEntry(
            name=lora.file.path.name,
            sha256=lora.file.sha256,
            strength=lora.strength,
            type=lora.file.type_name,
            rank=lora.file.rank,
            alpha=lora.file.alpha,
            layers=checkpoint.layers_changed(lora),
        )
        for lora in checkpoint.loras
    )


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


@dataclass(frozen=True, slots=True)
class _Made:
    export: CachedResult
    mnn: CachedResult
    verify: CachedResult
    ort_int8: CachedResult | None
    split: CachedResult | None


def _make_component(
    request: ConvertRequest, cache: StageCache, component: Component, keys: Keys, report: Report
) -> _Made:
    recipe = request.recipe.for_component(component)

    def staged(stage: Stage, key: str, make: Callable[[Path], dict[str, Any]]) -> CachedResult:
        report(StageEvent(component, stage, "started"))
        started = time.perf_counter()
        if request.force:
            cache.drop(stage, key)
        result, reused = cache.get(stage, key, make)
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
        "mnn", keys.mnn, lambda folder: mnn_stage(reference, component, recipe, planned, folder, request.target_mnn)
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
                reference, component, recipe, planned, layout, folder, threads, request.target_mnn
            ),
        )
    return _Made(export, mnn, verify, int8, split)


def _assemble(
    request: ConvertRequest, existing: Bundle | None, keys: Mapping[Component, Keys], made: Mapping[Component, _Made]
) -> Bundle:
    """Put the files in place, the manifest last."""
    out, recipe = request.out, request.recipe
    dropped = {*made, *(_of_other_weights(existing, request) if existing else ())}
    artifacts = [
        artifact
        for artifact in (existing.manifest.artifacts if existing else ())
        if artifact.component is not None and artifact.component not in dropped
    ]
    for component, results in made.items():
        artifacts += _component_artifacts(request, component, keys[component], results)
    artifacts += _shared_artifacts(request)
    order = list(Component)
    artifacts.sort(key=lambda a: (order.index(a.component) if a.component else len(order), a.kind))
    manifest = Manifest(
        schema_version=1,
        variant=request.checkpoint.variant_name,
        recipe=recipe.name,
        checkpoint={
            "source": request.checkpoint.layout.source_id or request.checkpoint.folder.name,
            "digests": {c.value: request.checkpoint.digest(c) for c in components_of(request.checkpoint.layout)},
        },
        loras=lora_entries(request.checkpoint),
        tools=tool_versions(),
        layout=request.checkpoint.layout,
        artifacts=tuple(artifacts),
    )
    bundle = Bundle(out, manifest)
    bundle.write()
    return bundle


def _component_artifacts(request: ConvertRequest, component: Component, keys: Keys, made: _Made) -> list[Artifact]:
    recipe, name = request.recipe.for_component(component), component.value
    mnn, weights = _entries(made.mnn, f"{name}.mnn", f"{name}.mnn.weight", "")
    for entry in filter(None, (mnn, weights)):
        link_or_copy(made.mnn.file(entry.path), request.out / entry.path)
    if weights is None:
        # Of an earlier, larger model: MNN finds it by its name.
        (request.out / f"{name}.mnn.weight").unlink(missing_ok=True)
    artifacts = [
        Artifact(
            **dict(mnn),
            kind="mnn",
            component=component,
            precision=recipe.precision,
            storage=made.mnn.notes["storage"],
            fidelity=Fidelity(**made.verify.notes["fidelity"]),
            floor_db=recipe.floor_db,
            companion=weights,
            target_mnn=request.target_mnn,
            fingerprint=keys.verify,
        ),
        Artifact(
            **_kept(request, made.export, component, REFERENCE_FOLDER),
            kind="onnx",
            component=component,
            precision="fp32",
            fingerprint=keys.export,
        ),
    ]
    if made.ort_int8 is not None:
        notes = made.ort_int8.notes
        artifacts.append(
            Artifact(
                **_kept(request, made.ort_int8, component, ORT_INT8_FOLDER),
                kind="onnx-int8",
                component=component,
                precision=notes["precision"],
                fidelity=Fidelity(**notes["fidelity"]),
                floor_db=notes["floor_db"],
                fingerprint=keys.ort_int8,
            )
        )
    if made.split is not None:
        artifacts += _split_artifacts(request, component, keys, made.split)
    return artifacts


def _split_artifacts(request: ConvertRequest, component: Component, keys: Keys, made: CachedResult) -> list[Artifact]:
    recipe = request.recipe.for_component(component)
    artifacts = []
    for kind, name in zip(SPLIT_KINDS, split_names(component), strict=True):
        entry, weights = _entries(made, name, f"{name}.weight", "")
        for file in filter(None, (entry, weights)):
            link_or_copy(made.file(file.path), request.out / file.path)
        artifacts.append(
            Artifact(
                **dict(entry),
                kind=kind,
                component=component,
                precision=recipe.precision,
                fidelity=Fidelity(**made.notes["fidelity"]),
                floor_db=recipe.floor_db,
                companion=weights,
                fingerprint=keys.split,
            )
        )
    return artifacts


def _kept(request: ConvertRequest, result: CachedResult, component: Component, folder: str) -> dict[str, Any]:
    """Return how the manifest describes an ONNX that stays in the cache, or is copied if the bundle shall hold it."""
    name = component.value
    onnx, data = _entries(result, f"{name}.onnx", f"{name}.onnx.data", f"{folder}/")
    if request.with_reference:
        for entry in filter(None, (onnx, data)):
            # A copy: ONNX libraries refuse external data that has a second hard link.
            with atomic_path(request.out / entry.path) as temporary:
                shutil.copyfile(result.file(Path(entry.path).name), temporary)
    kept_at = None if request.with_reference else os.path.relpath(result.folder, request.out)
    return dict(onnx) | {"companion": data, "kept_at": kept_at}


def _entries(result: CachedResult, main: str, companion: str, folder: str) -> tuple[FileEntry, FileEntry | None]:
    found = [
        FileEntry(path=folder + file, sha256=result.files[file], bytes=result.file(file).stat().st_size)
        for file in (main, companion)
        if file in result.files
    ]
    return found[0], found[1] if len(found) > 1 else None


def _shared_artifacts(request: ConvertRequest) -> list[Artifact]:
    """Write what a client needs beside the models."""
    out, checkpoint = request.out, request.checkpoint
    write_text(out / RECIPE, request.recipe.to_yaml())
    write_text(out / BOTTLENECK, bottleneck_params(checkpoint))
    artifacts = [
        Artifact(**dict(FileEntry.of(out, RECIPE)), kind="recipe"),
        Artifact(**dict(FileEntry.of(out, BOTTLENECK)), kind="bottleneck_params"),
    ]
    tokenizer = checkpoint.folder / TEXT_ENCODER_FOLDER / TOKENIZER
    if checkpoint.layout.text_encoder is not None:
        # A hard link would tie the bundle to the user's own file, which may be edited in place.
        with contextlib.suppress(shutil.SameFileError):
            write_text(out / TOKENIZER, tokenizer.read_text(encoding="utf-8"))
        artifacts.append(Artifact(**dict(FileEntry.of(out, TOKENIZER)), kind="tokenizer"))
    return artifacts


def bottleneck_params(checkpoint: "Checkpoint") -> str:
    """Return `bottleneck_params.json` as clients read it: nested lists [1][C][1], and running_std as [value]."""
    state = checkpoint.state(Component.DECODER)
    names = ("scaling_factor", "bias", "running_std")
    values = {name: state[f"bottleneck.{name}"].tolist() for name in names}
    if any(not v for v in values.values()):
        raise ConversionError("The checkpoint's bottleneck is empty.")
    return json.dumps(values) + "\n"
