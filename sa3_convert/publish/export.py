"""Bundles written as a tree: the published one, or a folder per bundle for its client. What was written opens again.

In the published tree bundles share files. Where they offer one name with different contents, as decoders of two
precisions do, the one of fewest bits has it, as on the seed card, and the others say their precision behind it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from sa3_convert.bundle.manifest import (
    MANIFEST,
    RECIPE,
    SLOTS_OF,
    Artifact,
    ArtifactKind,
    FileEntry,
    LoraEntry,
    Manifest,
)
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.variants import published_names
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, UsageError
from sa3_convert.publish.card import card as card_text
from sa3_convert.publish.contract import CONTRACT, contract_of
from sa3_convert.publish.licences import notice
from sa3_convert.publish.measured import ReadBench, ReadReport, by_bundle
from sa3_convert.publish.names import (
    SHARED,
    check_client_runs,
    client_flags,
    client_variant,
    family_folder,
    published_path,
    slot_name,
)
from sa3_convert.system.checked_files import inside
from sa3_convert.system.files import atomic_folder, check_new_folder, copy_file, sha256_file
from sa3_convert.system.untrusted import read_text

Layout = Literal["hub", "flat"]

SUMS: Final = "SHA256SUMS"
_README, _PICTURE = "README.md", "README.png"
_KINDS: Final[tuple[ArtifactKind, ...]] = ("mnn", "tokenizer", "bottleneck_params", "recipe")
ORT_INT8: Final[ArtifactKind] = "onnx-int8"
SLOTS: Final[ArtifactKind] = "mnn-slots"
FORMS: Final[Mapping[ArtifactKind, str]] = {
    ORT_INT8: "for onnxruntime-int8. Convert again with --with-ort-int8.",
    SLOTS: "that take adapters. Convert again with --adapter-slots 16.",
}
"""What is written only when asked for, being large and for no client but ours; what a bundle without it is told."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A bundle's place in a tree."""

    bundle: Bundle
    folder: str
    """Of its manifest."""
    root: str
    """Of what its manifest's paths are relative to, in the tree; empty for the tree itself."""
    paths: tuple[tuple[Artifact, str], ...]
    """Where its files go, from that root."""
    flags: tuple[str, ...] | None = None
    """Of the client, where the names are its slots."""

    def manifest(self) -> Manifest:
        """Return what is said of the bundle there."""
        moved = tuple(artifact.moved(path) for artifact, path in self.paths)
        base = "." if self.root == self.folder else "../.."
        given = self.bundle.manifest.model_copy(update={"artifacts": moved, "base": base})
        return Manifest.model_validate_json(given.to_json(), strict=True)


@dataclass(frozen=True)
class Export:
    """What stands in the tree now."""

    files: dict[str, tuple[Path, FileEntry]] = field(default_factory=dict)
    """Copies, by path, of what."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """Files that say what the others are, by path."""
    left_out: tuple[str, ...] = ()
    """What the bundles have beside it, a sentence each."""
    up_to_date: bool = False

    def sums(self, root: str) -> str:
        """Return `SHA256SUMS` of everything below a folder."""
        hashes = {path: entry.sha256 for path, (_, entry) in self.files.items()}
        hashes |= {path: hashlib.sha256(text).hexdigest() for path, text in self.texts.items()}
        below = {
            PurePosixPath(path).relative_to(root) if root else path: h
            for path, h in hashes.items()
            if PurePosixPath(path).is_relative_to(root)
        }
        return "".join(f"{digest}  {path}\n" for path, digest in sorted((str(p), h) for p, h in below.items()))


_Texts = Mapping[str, bytes]
Golden = Callable[[Bundle], _Texts]
Draw = Callable[[Mapping[str, Manifest], Sequence[ReadReport]], bytes | None]


@dataclass(frozen=True)
class Card:
    """What the card of an export is made from, beside the manifests."""

    reports: Sequence[ReadReport] = ()
    benches: Sequence[ReadBench] = ()
    name: str | None = None
    """The hub id that the export will have."""
    draw: Draw = lambda manifests, reports: None
    """Draws the card's picture as PNG, or says that it cannot."""


def export_bundles(
    bundles: Sequence[Bundle],
    target: Path,
    layout: Layout,
    *,
    force: bool = False,
    forms: Sequence[ArtifactKind] = (),
    golden: Golden = lambda _: {},
    card: Card = Card(),
) -> Export:
    """Write bundles as a tree into `target`.

    Args:
        bundles: open ones.
        target: a folder that does not exist or is empty.
        layout: "hub", the published tree, or "flat", a folder per bundle with the names that its client opens.
        force: an earlier export may stand there; it is replaced unless it is what would be written.
        forms: of `FORMS`, to be written too; of both also what takes adapters in integers.
        golden: gives results of a bundle that clients can test themselves with; see `contract.golden_of`.
        card: what the README says beside what the manifests do.

    Raises:
        UsageError: `target` holds something else.
        InputError: something was measured on other models.
        BundleError: a bundle is not what its manifest says, two contradict each other, or the client cannot run one.

    """
    if not force or not _is_export(target):
        check_new_folder(target)
    export = planned_export(bundles, layout, golden, card, forms=forms)
    if force and _stands(export, target):
        return Export(export.files, export.texts, export.left_out, up_to_date=True)
    with atomic_folder(target, replace=force) as temporary:
        for path, (source, entry) in export.files.items():
            copy = inside(temporary, path)
            copy_file(source, copy)
            if sha256_file(copy) != entry.sha256:
                raise BundleError(f"{source} changed while it was exported.")
        for path, text in export.texts.items():
            file = inside(temporary, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text)
    return export


def planned_export(
    bundles: Sequence[Bundle], layout: Layout, golden: Golden, card: Card, *, forms: Sequence[ArtifactKind] = ()
) -> Export:
    """Return what `export_bundles` would write; the bundles' files were held to their manifests."""
    for bundle in bundles:
        bundle.check(kinds=("mnn", *_kinds(forms)))
    placed = _in_tree(bundles) if layout == "hub" else [*_for_client(bundles)]
    placed = [_with_forms(one, forms) for one in placed]
    return _planned(placed, golden, _describe(placed, card))


def _kinds(forms: Sequence[ArtifactKind]) -> list[ArtifactKind]:
    return [*forms, *([SLOTS_OF[ORT_INT8]] if {ORT_INT8, SLOTS} <= set(forms) else [])]


def _with_forms(one: _Placed, forms: Sequence[ArtifactKind]) -> _Placed:
    """Return a place with other forms of the models in it, beside the manifest: their files name one another."""
    for form in forms:
        if form not in one.bundle.model_kinds:
            raise BundleError(f"{one.bundle.path} has no models {FORMS[form]}")
    within = "" if one.root == one.folder else f"{one.folder}/"
    found = [artifact for artifact in one.bundle.manifest.artifacts if artifact.kind in _kinds(forms)]
    return replace(one, paths=(*one.paths, *((a, f"{within}{a.kind}/{Path(a.path).name}") for a in found)))


def _planned(placed: Sequence[_Placed], golden: Golden, describe: Callable[[Sequence[_Placed]], _Texts]) -> Export:
    export = Export(left_out=tuple(_left_out(placed)))
    for one in placed:
        for artifact, path in one.paths:
            for entry, moved in zip(artifact.files, artifact.moved(path).files, strict=True):
                name, source = _joined(one.root, moved.path), one.bundle.place(artifact, entry)
                other, taken = export.files.setdefault(name, (source, entry))
                if taken.sha256 != entry.sha256:
                    raise BundleError(f"{name} would come from both {other} and {source}, with different contents.")
        manifest, results = one.manifest(), golden(one.bundle)
        export.texts[f"{one.folder}/{MANIFEST}"] = manifest.to_json().encode()
        told = json.dumps(contract_of(manifest, bool(results)), indent=2, ensure_ascii=False) + "\n"
        export.texts[f"{one.folder}/{CONTRACT}"] = told.encode()
        export.texts.update({f"{one.folder}/{name}": content for name, content in results.items()})
    for root in dict.fromkeys(one.root for one in placed):
        of_root = [one for one in placed if one.root == root]
        export.texts.update({_joined(root, name): text for name, text in describe(of_root).items()})
        export.texts[_joined(root, "NOTICE")] = notice([one.bundle.manifest for one in of_root]).encode()
        export.texts[_joined(root, SUMS)] = export.sums(root).encode()
    return export


def _describe(placed: Sequence[_Placed], card: Card) -> Callable[[Sequence[_Placed]], _Texts]:
    """Return what makes the README and its picture of the bundles of one root."""
    manifests = {one.folder: one.manifest() for one in placed}
    reports, benches = by_bundle(manifests, card.reports), by_bundle(manifests, card.benches)

    def describe(of_root: Sequence[_Placed]) -> _Texts:
        own = {one.folder.removeprefix(one.root): manifests[one.folder] for one in of_root}
        told = [report for one in of_root for report in reports[one.folder]]
        timed = [bench for one in of_root for bench in benches[one.folder]]
        drawn = card.draw(own, told)
        usage = {one.folder.removeprefix(one.root): [*_client_lines(one)] for one in of_root}
        picture = None if drawn is None else _PICTURE
        text = card_text(own, told, timed, name=card.name, picture=picture, usage=usage)
        return {_README: text.encode()} | ({} if drawn is None else {_PICTURE: drawn})

    return describe


def _joined(root: str, path: str) -> str:
    return f"{root}/{path}" if root else path


def _left_out(placed: Sequence[_Placed]) -> Iterator[str]:
    for one in placed:
        written = {artifact.kind for artifact, _ in one.paths}
        artifacts = one.bundle.manifest.artifacts
        others = sorted({a.kind for a in artifacts if a.kind not in written and a.kept_at is None})
        if others:
            yield f"{one.bundle.path}: not published are its files of kind {', '.join(others)}."


def _is_export(target: Path) -> bool:
    """Tell whether a folder holds nothing but what an export lists."""
    listed = set()
    for sums in (target / SUMS, *target.glob(f"*/{SUMS}")):
        try:
            lines = read_text(sums).splitlines()
        except (OSError, ValueError):
            continue
        listed |= {sums, *(sums.parent / line.partition("  ")[2] for line in lines)}
    found = {path for path in target.rglob("*") if not path.is_dir()} if target.is_dir() else set()
    return bool(found) and found <= listed


def _stands(export: Export, target: Path) -> bool:
    """Tell whether a folder holds what would be written, to the last byte, and nothing else."""
    wanted = {path: entry.sha256 for path, (_, entry) in export.files.items()}
    wanted |= {path: hashlib.sha256(text).hexdigest() for path, text in export.texts.items()}
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    return found == wanted.keys() and all(sha256_file(target / path) == digest for path, digest in wanted.items())


def _in_tree(bundles: Sequence[Bundle]) -> list[_Placed]:
    """Place bundles in the published tree: each name once, or refused if one would have different contents."""
    wanted = [
        (bundle, artifact, path)
        for bundle in bundles
        for artifact in bundle.manifest.artifacts
        if (path := _wanted_path(bundle, artifact, bundles)) is not None
    ]
    holders: dict[str, list[tuple[Bundle, Artifact]]] = {}
    for bundle, artifact, path in sorted(wanted, key=lambda item: _bits(item[1])):
        holders.setdefault(path, []).append((bundle, artifact))
    taken: dict[str, tuple[Bundle, Artifact]] = {}
    names: dict[int, str] = {}
    for path, offers in holders.items():
        for bundle, artifact in offers:
            plain = Path(path)
            first = offers[0][1]
            differs = artifact.content != first.content and _bits(artifact) != _bits(first)
            name = str(plain.with_name(f"{plain.stem}_{artifact.precision}{plain.suffix}")) if differs else path
            other = taken.setdefault(name, (bundle, artifact))
            if other[1].content != artifact.content:
                raise BundleError(
                    f"{name} would come from both {other[0].path} and {bundle.path}, with different contents. "
                    "Export them into separate folders."
                )
            names[id(artifact)] = name
    placed = [
        _Placed(bundle, _folder(bundle), "", tuple((a, names[id(a)]) for b, a, _ in wanted if b is bundle))
        for bundle in bundles
    ]
    if twice := [folder for folder, count in Counter(one.folder for one in placed).items() if count > 1]:
        raise BundleError(f"Two of the bundles would be {twice[0]}. Export them into separate folders.")
    return placed


def _bits(artifact: Artifact) -> int:
    return int((artifact.precision or "fp32").lstrip("intfp"))


def _wanted_path(bundle: Bundle, artifact: Artifact, bundles: Sequence[Bundle]) -> str | None:
    """Return where the published tree has a file, or None for what it has not."""
    variant, component = bundle.manifest.variant, artifact.component
    match artifact.kind:
        case "tokenizer":
            return f"shared/{Path(artifact.path).name}"
        case "bottleneck_params":
            name = Path(artifact.path)
            return f"shared/{name.stem}{published_names(variant).codec}{name.suffix}"
        case "recipe":
            return f"{_folder(bundle)}/{RECIPE}"
        case "mnn" if component is not None:
            # The number conditioner is part of its tier by name; it has a fifth of a megabyte in any precision.
            is_number = component is Component.NUMBER_CONDITIONER
            precision = _tier(bundle) if is_number else artifact.precision or "fp32"
            own = component in SHARED and not _is_shared(component, bundle, bundles)
            return published_path(variant, component, precision, own=own, loras=_loras(bundle, component))
    return None


def _folder(bundle: Bundle) -> str:
    return f"{family_folder(bundle.manifest)}/{_tier(bundle)}"


def _is_shared(component: Component, bundle: Bundle, bundles: Sequence[Bundle]) -> bool:
    """Tell whether all bundles that would use the same name for a shared component have the same weights."""
    codec = published_names(bundle.manifest.variant).codec

    def sharing(other: Bundle) -> bool:
        same_codec = published_names(other.manifest.variant).codec == codec
        plain = component in other.components and not _loras(other, component)
        return plain and (component is Component.TEXT_ENCODER or same_codec)

    return len({other.manifest.checkpoint.digests.get(component) for other in bundles if sharing(other)}) <= 1


def _loras(bundle: Bundle, component: Component) -> list[LoraEntry]:
    """Return the adapters that change a component."""
    return [lora for lora in bundle.manifest.loras if lora.layers.get(component)]


def _tier(bundle: Bundle) -> str:
    """Return the precision that names the folder: the DiT's, else the decoder's."""
    for component in (Component.DIT, Component.DECODER):
        if component in bundle.components:
            return bundle.artifact(component).precision or "fp32"
    raise BundleError(f"Bundle {bundle.path} has neither a DiT nor a decoder to publish.")


def _for_client(bundles: Sequence[Bundle]) -> Iterator[_Placed]:
    """Place each bundle in a folder of its own, under the names that the client opens."""
    families = [family_folder(bundle.manifest) for bundle in bundles]
    folders = [
        family if families.count(family) == 1 else f"{family}-{bundle.manifest.recipe}"
        for family, bundle in zip(families, bundles, strict=True)
    ]
    for folder, bundle in zip(folders, bundles, strict=True):
        if folders.count(folder) > 1:
            raise UsageError(f"Two of the bundles would be {folder}. Export them into separate folders.")
        check_client_runs(bundle)
        flags = client_flags({c: bundle.artifact(c).precision or "fp32" for c in bundle.components})
        paths = []
        for artifact in bundle.manifest.artifacts:
            if artifact.kind == "mnn" and artifact.component is not None:
                paths.append((artifact, slot_name(bundle.manifest.variant, artifact.component, flags)))
            elif artifact.kind in _KINDS:
                paths.append((artifact, Path(artifact.path).name))
        yield _Placed(bundle, folder, folder, tuple(paths), flags)


def _client_lines(one: _Placed) -> Iterator[str]:
    """Yield how apps use what was exported, and how the client runs a folder whose names are its slots."""
    yield f"Apps find all that they need to run the models in `{CONTRACT}`; {SUMS} has all hashes (`sha256sum -c`)."
    yield ""
    if one.flags is None:
        return
    variant = client_variant(one.bundle.manifest.variant)
    yield f'    sa3-cli --mnn {" ".join(one.flags)} --variant {variant} --models-dir . --prompt "warm analog synth pad"'
    yield ""
    yield "The client (stable-audio-3-rs) opens fixed names, whatever they hold: the table says what each one is."
    layout = one.bundle.layout
    assert layout.dit is not None
    assert layout.text_encoder is not None
    if (layout.autoencoder.latent_dim, layout.text_encoder.max_length, layout.dit.cond_token_dim) != (256, 256, 768):
        yield "This model is smaller than the published ones, whose shapes are fixed in that client: it cannot run it."
    yield ""
