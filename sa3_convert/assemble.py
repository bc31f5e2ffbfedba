"""A bundle from the results of its stages: files put in place, the manifest last."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_convert.bundle.manifest import (
    SPLIT_KINDS,
    Artifact,
    ArtifactKind,
    Bundle,
    CheckpointOrigin,
    FileEntry,
    Manifest,
)
from sa3_convert.bundle.words import as_text
from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.existing import (
    ORT_INT8_FOLDER,
    REFERENCE_FOLDER,
    SHARED,
    checkpoint_digests,
    lora_entries,
    shared_text,
)
from sa3_convert.files import copy_file, inside, write_text
from sa3_convert.plan import Plan, Step
from sa3_convert.request import ConvertRequest
from sa3_convert.stage_cache import CachedResult
from sa3_convert.stages import Stage, split_names
from sa3_convert.tools import tool_versions

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
