"""Bundles under the names that existing clients read: the published hub tree, or all files in one flat folder.

Names follow the published card, which has the small family; medium's follow the same pattern. A name states a precision
only where the audited file has it: a text encoder of eight bits is never written as `…_int4`. Small variants share one
autoencoder and medium ones another, so each is written once, and where bundles of several precisions offer one
published name, the one of fewest bits takes it, as on the card. The text encoders differ by the padding embedding
inside them: with several variants each gets its own, beside its DiT.

A model with adapters in it carries a tag in its name, after the variant: their names, in letters that every file system
and web server takes, and the start of a hash of their contents and strengths. It never lies under a shared name. What
adapters leave alone is the plain model, and keeps its name.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from sa3_convert.bundle.manifest import Artifact, FileEntry, LoraEntry
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.variants import PublishedNames, published_names
from sa3_convert.components import Component
from sa3_convert.errors import BundleError
from sa3_convert.system.checked_files import inside
from sa3_convert.system.files import atomic_folder, check_new_folder, copy_file, sha256_file
from sa3_convert.system.sealed import fingerprint

Layout = Literal["hub", "flat"]

_SHARED = (Component.TEXT_ENCODER, Component.DECODER, Component.ENCODER)
"""Components for which the published tree has one file for all variants."""
_LONGEST_NAME: Final = 24
_MOST_NAMES: Final = 3


@dataclass(frozen=True, slots=True)
class Published:
    """One file of the tree and where it comes from."""

    path: str
    source: Path
    entry: FileEntry
    origin: str
    bits: int
    weights: str | None
    """Digest of the checkpoint's tensors behind it."""


def published_path(
    variant: str, component: Component, precision: str, *, own: bool = False, loras: Sequence[LoraEntry] = ()
) -> str:
    """Return a model's path in the published hub tree, by its audited precision and the adapters that change it.

    `own` says that the variant has weights of its own where the tree has one file for all variants.
    """
    names = published_names(variant)
    family, base = names.folder, names.base + _tag(loras)
    if (own or loras) and component in _SHARED:
        return f"{family}/{precision}/{component.value}_{family}{base}_{precision}.mnn"
    match component:
        case Component.TEXT_ENCODER:
            return "shared/text_encoder.mnn" if precision.startswith("fp") else f"shared/text_encoder_{precision}.mnn"
        case Component.DECODER:
            return f"shared/decoder{names.codec}_fused_wn.mnn"
        case Component.ENCODER:
            suffix = "" if precision.startswith("fp") else f"_{precision}"
            return f"{names.codec_folder}/{precision}/encoder{names.codec}{suffix}.mnn"
        case Component.DIT:
            suffix = "_v2_f32io" if precision == "fp16" else ""
            return f"{family}/{precision}/dit_{family}{base}_{precision}{suffix}.mnn"
        case Component.NUMBER_CONDITIONER:
            return f"{family}/{precision}/number_conditioner_{family}{base}_{precision}.mnn"


def _tag(loras: Sequence[LoraEntry]) -> str:
    """Return what names say of adapters: nothing of none; names are for people, the hash tells sets apart."""
    if not loras:
        return ""
    names = (re.sub(r"[^a-z0-9]+", "-", Path(lora.name).stem.lower())[:_LONGEST_NAME].strip("-") for lora in loras)
    known = [name or "lora" for name in names]
    shown = known[:_MOST_NAMES] + ([f"{len(known) - _MOST_NAMES}-more"] if len(known) > _MOST_NAMES else [])
    exact = fingerprint(loras=[[lora.sha256, lora.strength] for lora in loras])
    return f"_{'-'.join(shown)}-{exact[:12]}"


def published_files(bundles: Sequence[Bundle]) -> list[Published]:
    """Return every file of the published tree, each path once; refused if one would have different contents."""
    chosen: dict[str, Published] = {}
    for bundle in bundles:
        tier = _tier(bundle)
        for artifact in bundle.manifest.artifacts:
            own = artifact.component in _SHARED and not _is_shared(artifact.component, bundle, bundles)
            for path, entry in _paths(bundle, artifact, tier, own=own):
                offered = Published(
                    path=path,
                    source=bundle.path / entry.path,
                    entry=entry,
                    origin=str(bundle.path),
                    bits=int((artifact.precision or "fp32").lstrip("intfp")),
                    weights=_weights_digest(bundle, artifact.component),
                )
                chosen[path] = _preferred(chosen.get(path), offered)
    return [chosen[path] for path in sorted(chosen)]


def _names(bundle: Bundle) -> PublishedNames:
    return published_names(bundle.manifest.variant)


def _is_shared(component: Component, bundle: Bundle, bundles: Sequence[Bundle]) -> bool:
    """Tell whether all bundles that would use the same name for a shared component have the same weights."""

    def sharing(other: Bundle) -> bool:
        same_codec = _names(other).codec == _names(bundle).codec
        plain = component in other.components and not _loras(other, component)
        return plain and (component is Component.TEXT_ENCODER or same_codec)

    return len({_weights_digest(other, component) for other in bundles if sharing(other)}) <= 1


def _loras(bundle: Bundle, component: Component) -> list[LoraEntry]:
    """Return the adapters that change a component."""
    return [lora for lora in bundle.manifest.loras if lora.layers.get(component)]


def _tier(bundle: Bundle) -> str:
    """Return the precision that names the folder: the DiT's, else the decoder's."""
    for component in (Component.DIT, Component.DECODER):
        if component in bundle.components:
            return bundle.artifact(component).precision or "fp32"
    raise BundleError(f"Bundle {bundle.path} has neither a DiT nor a decoder to publish.")


def _weights_digest(bundle: Bundle, component: Component | None) -> str | None:
    return bundle.manifest.checkpoint.digests.get(component) if component else None


def _paths(bundle: Bundle, artifact: Artifact, tier: str, *, own: bool) -> list[tuple[str, FileEntry]]:
    if artifact.kind == "tokenizer":
        return [(f"shared/{Path(artifact.path).name}", artifact)]
    if artifact.kind == "bottleneck_params":
        name = Path(artifact.path)
        return [(f"shared/{name.stem}{_names(bundle).codec}{name.suffix}", artifact)]
    if artifact.kind != "mnn" or artifact.component is None:
        return []
    precision = artifact.precision or "fp32"
    if artifact.component is Component.NUMBER_CONDITIONER:
        # Part of its tier by name; a fifth of a megabyte in any precision.
        precision = tier
    loras = _loras(bundle, artifact.component)
    path = published_path(bundle.manifest.variant, artifact.component, precision, own=own, loras=loras)
    found: list[tuple[str, FileEntry]] = [(path, artifact)]
    if artifact.companion is not None:
        found.append((f"{path}.weight", artifact.companion))
    return found


def _preferred(first: Published | None, second: Published) -> Published:
    """Return the file that takes a name offered twice: the one of fewer bits, if both come from the same weights."""
    if first is None or first.entry.sha256 == second.entry.sha256:
        return first or second
    if first.bits == second.bits or first.weights != second.weights:
        raise BundleError(
            f"{first.path} would come from both {first.origin} and {second.origin}, with different contents. "
            "Export them into separate folders."
        )
    return min(first, second, key=lambda published: published.bits)


def _flattened(files: list[Published]) -> list[Published]:
    """Return the files under their names alone, each once; two different files of one name are refused."""
    flat: dict[str, Published] = {}
    for file in files:
        name = Path(file.path).name
        twin = flat.setdefault(name, replace(file, path=name))
        if twin.entry.sha256 != file.entry.sha256:
            raise BundleError(
                f"One flat folder cannot hold both {name} of {twin.origin} and that of {file.origin}. "
                "Use --layout hub, or export them into separate folders."
            )
    return list(flat.values())


def export_bundles(bundles: Sequence[Bundle], target: Path, layout: Layout) -> list[Published]:
    """Write bundles as the published tree into `target`, which must not exist or be empty.

    Returns:
        What was written, by published path (file name alone in the flat layout).

    Raises:
        UsageError: `target` holds something already.
        BundleError: a bundle is not what its manifest says, or two contradict each other.

    """
    check_new_folder(target)
    for bundle in bundles:
        bundle.check()
    files = published_files(bundles)
    if layout == "flat":
        files = _flattened(files)
    with atomic_folder(target) as temporary:
        for file in files:
            copy = inside(temporary, file.path)
            copy_file(file.source, copy)
            if sha256_file(copy) != file.entry.sha256:
                raise BundleError(f"{file.source} changed while it was exported.")
    return files
