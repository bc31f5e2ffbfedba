"""What a bundle says of itself, and what stands in its place: whether that may be completed, what in it is right."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from sa3_convert.bundle.manifest import (
    BOTTLENECK,
    COMPANIONS,
    MANIFEST,
    RECIPE,
    TOKEN_TABLE,
    TOKENIZER,
    Artifact,
    ArtifactKind,
    CheckpointOrigin,
    LoraEntry,
    Manifest,
    as_text,
)
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.config import TEXT_ENCODER_FOLDER
from sa3_convert.components import Component, components_of
from sa3_convert.convert.stages import STAGES, STAGES_OF, StageKeys
from sa3_convert.errors import BundleError, UsageError
from sa3_convert.system.machine import tool_versions

if TYPE_CHECKING:
    from sa3_convert.convert.plan import ConvertRequest

SHARED: Final[Mapping[ArtifactKind, str]] = {
    "recipe": RECIPE,
    "bottleneck_params": BOTTLENECK,
    "tokenizer": TOKENIZER,
}
"""Files for all components."""


def existing_bundle(request: "ConvertRequest") -> Bundle | None:
    """Return the bundle at `out` if it can be completed; a damaged one is made anew, another one refused."""
    out = request.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a folder.")
    if not (out / MANIFEST).exists():
        _refuse_other_files(request)
        return None
    try:
        bundle = Bundle.open(out)
    except BundleError:
        return None
    if bundle.manifest.base != ".":
        raise UsageError(f"{out} is part of what `bundle export` wrote. Give another --out.")
    wanted = manifest_of(request)
    found, asked = _made_from(bundle.manifest), _made_from(wanted)
    if found != asked and not request.force:
        raise UsageError(
            f"{out} holds a bundle of {_described(bundle.manifest)}; this would replace it by {_described(wanted)}. "
            "Give another --out, or --force."
        )
    if not request.force and (others := ", ".join(c.value for c in of_other_weights(bundle, request))):
        raise UsageError(
            f"{others} in {out} would stay, but came from other weights than this checkpoint's. "
            "Convert them too (leave --component away), give another --out, or --force to drop them."
        )
    return bundle if found[:2] == asked[:2] else None


def _refuse_other_files(request: "ConvertRequest") -> None:
    out = request.out
    leftovers = {file.name for file in out.iterdir() if not file.name.startswith(".")} if out.exists() else set()
    names = {
        name.format(component.value) + ending
        for stage in STAGES.values()
        for kind, name in stage.leaves.items()
        for ending in ("", COMPANIONS[kind])
        for component in Component
        if not stage.folder
    }
    known = {*SHARED.values(), TOKEN_TABLE, *(stage.folder for stage in STAGES.values()), *names}
    if (foreign := sorted(leftovers - known)) and not request.force:
        raise UsageError(
            f"--out {out} holds other files ({foreign[0]}, …). Give an empty folder, or --force to write into it."
        )


def _made_from(manifest: Manifest) -> tuple[str, str, tuple[tuple[str, float], ...]]:
    """Return what makes a bundle another one: variant, recipe, and adapters by content, strength and order."""
    return manifest.variant, manifest.recipe, tuple((lora.sha256, lora.strength) for lora in manifest.loras)


def _described(manifest: Manifest) -> str:
    loras = f"LoRAs {', '.join(lora.label for lora in manifest.loras)}" if manifest.loras else "no LoRA"
    return f"{manifest.variant} with recipe {manifest.recipe!r} and {loras}"


def manifest_of(request: "ConvertRequest", artifacts: Sequence[Artifact] = ()) -> Manifest:
    """Return the manifest of a bundle that was made as is asked for."""
    checkpoint = request.checkpoint
    loras = tuple(
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
    return Manifest(
        schema_version=1,
        variant=checkpoint.variant_name,
        recipe=request.recipe.name,
        checkpoint=CheckpointOrigin(
            source=as_text(checkpoint.layout.source_id or checkpoint.folder.name),
            digests={component: checkpoint.digest(component) for component in components_of(checkpoint.layout)},
            **checkpoint.source.model_dump(),
        ),
        loras=loras,
        tools=tool_versions(),
        layout=checkpoint.layout,
        artifacts=tuple(artifacts),
    )


def of_other_weights(bundle: Bundle, request: "ConvertRequest") -> list[Component]:
    """Return the components of a bundle that are not converted now and were not made from this checkpoint's weights."""
    digests, selected = bundle.manifest.checkpoint.digests, request.selected()
    return [
        component
        for component in bundle.components
        if component not in selected and digests.get(component) != request.checkpoint.digest(component)
    ]


def is_current(bundle: Bundle, request: "ConvertRequest") -> bool:
    """Tell whether a manifest says what it would say now, apart from its files and from components that nobody has."""
    found, wanted = bundle.manifest, manifest_of(request)
    digests = (found.checkpoint.digests, wanted.checkpoint.digests)
    same = all(
        getattr(found, name) == getattr(wanted, name) for name in ("variant", "recipe", "loras", "tools", "layout")
    ) and all(getattr(found.checkpoint, name) == getattr(wanted.checkpoint, name) for name in ("revision", "synthetic"))
    return same and all(digests[0].get(c) == digests[1].get(c) for c in {*request.selected(), *bundle.components})


def is_right(bundle: Bundle, artifact: Artifact, request: "ConvertRequest", keys: StageKeys) -> bool:
    """Tell whether a component's file is whole, where it is wanted, and what would be made now."""
    return (
        artifact.fingerprint == keys.get(STAGES_OF[artifact.kind][-1], "")
        and not (request.with_reference and artifact.kept_at is not None)
        and bundle.is_whole(artifact)
    )


def shared_kinds(request: "ConvertRequest") -> list[ArtifactKind]:
    """Return the files for all components that a bundle of this checkpoint has."""
    return [kind for kind in SHARED if kind != "tokenizer" or request.checkpoint.layout.text_encoder is not None]


def is_right_shared(bundle: Bundle, artifact: Artifact, request: "ConvertRequest") -> bool:
    """Tell whether a file for all components is whole and what would be written now."""
    if artifact.kind == "bottleneck_params":
        decoder = Component.DECODER
        same = bundle.manifest.checkpoint.digests.get(decoder) == request.checkpoint.digest(decoder)
    else:
        text = shared_text(request, artifact.kind)
        same = text is not None and artifact.sha256 == hashlib.sha256(text.encode()).hexdigest()
    return same and artifact.path == SHARED[artifact.kind] and bundle.is_whole(artifact)


def shared_text(request: "ConvertRequest", kind: ArtifactKind) -> str | None:
    """Return what a file for all components holds; None if this checkpoint has none, or has it in its weights."""
    if kind == "recipe":
        return request.recipe.to_yaml()
    if kind == "tokenizer" and request.checkpoint.tokenizer is not None:
        file = request.checkpoint.folder / TEXT_ENCODER_FOLDER / TOKENIZER
        return request.checkpoint.tokenizer.content or file.read_text(encoding="utf-8")
    return None
