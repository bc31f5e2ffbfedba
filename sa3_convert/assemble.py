"""A bundle from the results of its stages: files put in place, the manifest last."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_convert.bundle.manifest import (
    BOTTLENECK,
    RECIPE,
    SPLIT_KINDS,
    TOKENIZER,
    Artifact,
    Bundle,
    CheckpointOrigin,
    Fidelity,
    FileEntry,
    LoraEntry,
    Manifest,
    as_text,
)
from sa3_convert.checkpoint.layout import TEXT_ENCODER_FOLDER
from sa3_convert.components import Component, components_of
from sa3_convert.errors import ConversionError
from sa3_convert.files import copy_file, inside, write_text
from sa3_convert.request import ConvertRequest
from sa3_convert.stage_cache import CachedResult
from sa3_convert.stages import Keys, split_names
from sa3_convert.tools import tool_versions

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

REFERENCE_FOLDER = "reference"
"""Where a bundle keeps its reference ONNX files."""
ORT_INT8_FOLDER = "onnxruntime-int8"
"""Where a bundle keeps what ONNX Runtime computes with integers."""


@dataclass(frozen=True, slots=True)
class Made:
    """What the stages of one component left; None was not asked for."""

    export: CachedResult
    mnn: CachedResult
    verify: CachedResult
    ort_int8: CachedResult | None
    split: CachedResult | None


def lora_entries(checkpoint: "Checkpoint") -> tuple[LoraEntry, ...]:
    """Return what the manifest says of a checkpoint's adapters."""
    return tuple(
        LoraEntry(
            name=as_text(lora.file.path.name),
            sha256=lora.file.sha256,
            strength=lora.strength,
            type=lora.file.type_name,
            rank=lora.file.rank,
            alpha=lora.file.alpha,
            layers=checkpoint.layers_changed(lora),
        )
        for lora in checkpoint.loras
    )


def of_other_weights(bundle: Bundle, request: ConvertRequest) -> list[Component]:
    """Return the components of a bundle that are not converted now and were not made from this checkpoint's weights."""
    digests, selected = bundle.manifest.checkpoint.digests, request.selected()
    return [
        component
        for component in bundle.components
        if component not in selected and digests.get(component) != request.checkpoint.digest(component)
    ]


def assemble(
    request: ConvertRequest, existing: Bundle | None, keys: Mapping[Component, Keys], made: Mapping[Component, Made]
) -> Bundle:
    """Put the files in place, the manifest last."""
    out, recipe = request.out, request.recipe
    dropped = {*made, *(of_other_weights(existing, request) if existing else ())}
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
        checkpoint=CheckpointOrigin(
            source=as_text(request.checkpoint.layout.source_id or request.checkpoint.folder.name),
            digests={c: request.checkpoint.digest(c) for c in components_of(request.checkpoint.layout)},
        ),
        loras=lora_entries(request.checkpoint),
        tools=tool_versions(),
        layout=request.checkpoint.layout,
        artifacts=tuple(artifacts),
    )
    bundle = Bundle(out, manifest)
    bundle.write()
    return bundle


def _component_artifacts(request: ConvertRequest, component: Component, keys: Keys, made: Made) -> list[Artifact]:
    recipe = request.recipe.for_component(component)
    artifacts = [
        Artifact(
            **_placed(request, made.mnn, f"{component.value}.mnn"),
            kind="mnn",
            component=component,
            precision=recipe.precision,
            storage=made.mnn.notes["storage"],
            fidelity=Fidelity(**made.verify.notes["fidelity"]),
            floor_db=recipe.floor_db,
            target_mnn=request.target_of(component),
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
    return [
        Artifact(
            **_placed(request, made, name),
            kind=kind,
            component=component,
            precision=recipe.precision,
            fidelity=Fidelity(**made.notes["fidelity"]),
            floor_db=recipe.floor_db,
            fingerprint=keys.split,
        )
        for kind, name in zip(SPLIT_KINDS, split_names(component), strict=True)
    ]


def _placed(request: ConvertRequest, result: CachedResult, name: str) -> dict[str, Any]:
    """Put a `.mnn` into the bundle, with its file of weights if it has one; return how the manifest describes both."""
    mnn, weights = _entries(result, name, f"{name}.weight", "")
    for entry in filter(None, (mnn, weights)):
        copy_file(result.file(entry.path), _own(request.out, entry.path))
    if weights is None:
        # Of an earlier, larger model: MNN finds it by its name.
        (request.out / f"{name}.weight").unlink(missing_ok=True)
    return dict(mnn) | {"companion": weights}


def _kept(request: ConvertRequest, result: CachedResult, component: Component, folder: str) -> dict[str, Any]:
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
    write_text(_own(out, RECIPE), request.recipe.to_yaml())
    write_text(_own(out, BOTTLENECK), bottleneck_params(checkpoint))
    artifacts = [
        Artifact(**dict(FileEntry.of(out, RECIPE)), kind="recipe"),
        Artifact(**dict(FileEntry.of(out, BOTTLENECK)), kind="bottleneck_params"),
    ]
    tokenizer = checkpoint.folder / TEXT_ENCODER_FOLDER / TOKENIZER
    if checkpoint.layout.text_encoder is not None:
        copy_file(tokenizer, _own(out, TOKENIZER))
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
