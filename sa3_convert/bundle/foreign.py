"""A tree of published models without a manifest, opened as a bundle: its files say what they are; nothing is proven.

A model is recognised by the names of its inputs, which all clients share, and its dimensions are those that it
declares. What a file does not say is taken from the published family. Of several models of one component the one beside
the DiT is taken, then the smallest: of two text encoders the one that clients take by default.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Final, TypeVar

from sa3_convert.bundle.manifest import (
    BOTTLENECK,
    RECIPE,
    TOKENIZER,
    UNVERIFIED,
    Artifact,
    ArtifactKind,
    CheckpointOrigin,
    FileEntry,
    Manifest,
)
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.published import published_layout
from sa3_convert.checkpoint.variants import VARIANTS, published_names
from sa3_convert.components import Component, contract
from sa3_convert.errors import BundleError
from sa3_convert.mnn.compatibility import oldest_reader
from sa3_convert.mnn.file.audit import token_tables
from sa3_convert.mnn.file.contents import ModelStorage
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.system.checked_files import inside

SHARED: Final = "shared"
_MOST_FILES: Final = 100
_PRECISION: Final = re.compile(r"(?<![a-z0-9])(int[2-8]|fp16|fp32)(?![a-z0-9])")
_P = TypeVar("_P", bound=PurePath)
_Found = Mapping[Component, tuple[Path, ModelStorage]]


def foreign_files(path: Path) -> tuple[Path, list[Path]]:
    """Return the folder that paths are relative to, and the models that belong to `path`; none if it is no such tree.

    `path` is a tree, or in a tree like the published one the folder of one precision, which has models in `shared`.
    """
    path = Path(os.path.realpath(path))
    above = path.parent.parent
    own = sorted(file for depth in ("*", "*/*", "*/*/*") for file in path.glob(f"{depth}.mnn"))
    return belonging(path, own, [*above.glob(f"{SHARED}/*"), *above.glob(f"*/{path.name}/encoder*.mnn")])


def belonging(folder: _P, own: Sequence[_P], around: Sequence[_P]) -> tuple[_P, list[_P]]:
    """Return the folder that paths are relative to, and models: those below `folder`, or `around` it in its tree too.

    A family's variants share an encoder, which lies with one of them.
    """
    above = folder.parent.parent
    is_inner = all(file.parent == folder for file in own) and any(file.parent == above / SHARED for file in around)
    if own and is_inner:
        return above, [*own, *sorted({file for file in around if file.suffix == ".mnn"} - {*own})]
    return folder, [*own]


def unfitness(model: PurePath, dit: PurePath) -> tuple[bool, bool]:
    """Return how little a model belongs to a DiT by its name; of several the least is taken."""
    return model.parent != dit.parent, _is_medium(model) is not _is_medium(dit)


def beside(models: Sequence[_P], exists: Callable[[_P], bool]) -> Iterator[tuple[ArtifactKind, _P]]:
    """Yield tokenizer and bottleneck, from where models lie."""
    kinds: tuple[tuple[ArtifactKind, str], ...] = (("tokenizer", TOKENIZER), ("bottleneck_params", BOTTLENECK))
    for kind, name in kinds:
        medium = Path(name).with_stem(f"{Path(name).stem}_medium").name
        wanted = (medium, name) if any(map(_is_medium, models)) else (name,)
        places = [folder / spelled for spelled in wanted for folder in dict.fromkeys(file.parent for file in models)]
        if (place := next(filter(exists, places), None)) is not None:
            yield kind, place


def _is_medium(model: PurePath) -> bool:
    return "_medium" in model.stem


def foreign_manifest(path: Path) -> Manifest | None:
    """Return what a manifest would say of the models in a tree; None if there are none, or if they were a bundle.

    A recipe beside them says that they were one: what lost its manifest is damaged.

    Raises:
        BundleError: the models are of several DiTs, or do not fit one another.
        ModelFileError: a file is damaged.

    """
    root, files = foreign_files(path)
    if not files or (path / RECIPE).exists():
        return None
    if len(files) > _MOST_FILES:
        raise BundleError(f"{path} holds {len(files)} models and no manifest. Name the folder of one bundle.")
    for file in files:
        inside(root, str(file))
    found = _chosen(path, [(file, read_storage(file)) for file in files])
    layout = _layout(path, found)
    artifacts = [_artifact(root, component, *model) for component, model in found.items()]
    artifacts += _beside(root, [file for file, _ in found.values()])
    return Manifest(
        schema_version=1,
        base="." if root == Path(os.path.realpath(path)) else "../..",
        variant=_variant(found),
        recipe=UNVERIFIED,
        checkpoint=CheckpointOrigin(),
        tools={},
        layout=layout,
        artifacts=tuple(artifacts),
    )


def contradictions(name: str, storage: ModelStorage) -> Iterator[str]:
    """Yield what a file's name says of it that its contents do not."""
    stored = _precision(storage)
    for claimed in _PRECISION.findall(Path(name).stem.replace("f32io", "").replace("_", "-")):
        if stored is not None and claimed != stored:
            yield f"{name} calls itself {claimed.upper()}, its weights are {stored.upper()}."


def _chosen(path: Path, models: Sequence[tuple[Path, ModelStorage]]) -> _Found:
    inputs = {component: {port.name for port in contract(component, _PLAIN).inputs} for component in Component}
    by_component: dict[Component, list[tuple[Path, ModelStorage]]] = {}
    for file, storage in models:
        names = {port.name for port in storage.inputs}
        for component in Component:
            if names == inputs[component]:
                by_component.setdefault(component, []).append((file, storage))
    by_size = {
        component: sorted(models, key=lambda model: model[1].bytes) for component, models in by_component.items()
    }
    dits = [file for file, _ in by_size.get(Component.DIT, ())]
    if len(dits) > 1 and len({file.parent for file in dits}) > 1:
        folders = ", ".join(sorted({str(file.parent) for file in dits}))
        raise BundleError(f"{path} holds {len(dits)} DiTs and no manifest. Name the folder of one: {folders}.")
    if not by_component:
        raise BundleError(f"{path} holds no manifest, and no model of Stable Audio 3.")
    dit = dits[0] if dits else path / Component.DIT
    return {
        component: min(by_size[component], key=lambda model: unfitness(model[0], dit))
        for component in Component
        if component in by_size
    }


_PLAIN: Final = published_layout(VARIANTS["small-music"], "full")


def _variant(found: _Found) -> str:
    """Return the published variant that the DiT's name says, or `custom-small`."""
    name = found[Component.DIT][0].stem if Component.DIT in found else ""
    for variant in VARIANTS.values():
        names = published_names(variant.name)
        if not variant.is_autoencoder and re.match(rf"dit_{names.folder}{names.base}_(?!base)", name):
            return variant.name
    return "custom-medium" if any(_is_medium(file) for file, _ in found.values()) else "custom-small"


def _layout(path: Path, found: _Found) -> CheckpointLayout:
    """Return the dimensions that the files declare, the rest as published."""
    name = _variant(found)
    variant = VARIANTS.get(name, VARIANTS["medium" if name == "custom-medium" else "small-music"])
    plain = published_layout(variant, "full")
    shapes = {
        component: {port.name: port.shape or () for port in storage.inputs} for component, (_, storage) in found.items()
    }
    try:
        layout = _with_shapes(plain, shapes, found)
        for component, declared in shapes.items():
            for port in contract(component, layout).inputs:
                expected = tuple(size if isinstance(size, int) else -1 for size in port.shape)
                if declared[port.name] != expected:
                    raise ValueError(f"{port.name} of {component.value} is {list(declared[port.name])}, not {expected}")
    except (ValueError, IndexError) as error:
        raise BundleError(f"{path}: the models are not of one Stable Audio 3: {error}.") from None
    return layout


def _with_shapes(
    plain: CheckpointLayout, shapes: Mapping[Component, Mapping[str, tuple[int, ...]]], found: _Found
) -> CheckpointLayout:
    auto, dit, text, number = plain.autoencoder, plain.dit, plain.text_encoder, plain.number_conditioner
    if Component.DIT in shapes:
        channels = shapes[Component.DIT]["x"][1]
    elif Component.DECODER in shapes:
        channels = shapes[Component.DECODER]["latents"][1]
    else:
        channels = auto.latent_dim
    encoder, decoder = (replace(half, latent_dim=channels) for half in (auto.encoder, auto.decoder))
    auto = replace(auto, latent_dim=channels, encoder=encoder, decoder=decoder)
    if Component.DIT not in shapes:
        return CheckpointLayout(plain.sample_rate, plain.sample_size, auto)
    assert dit is not None
    assert text is not None
    assert number is not None
    _, tokens, width = shapes[Component.DIT]["cross_attn_cond"]
    if Component.TEXT_ENCODER in found:
        tables = list(token_tables(found[Component.TEXT_ENCODER][1]))
        if not tables:
            raise ValueError("the text encoder has no table of tokens that is known here")
        text = replace(text, vocab_size=max(table.shape[0] for table in tables))
    return replace(
        plain,
        autoencoder=auto,
        dit=replace(
            dit,
            io_channels=channels,
            cond_token_dim=width,
            global_cond_dim=width,
            local_add_cond_dim=channels + 1,
        ),
        text_encoder=replace(text, max_length=tokens - 1, hidden_size=width),
        number_conditioner=replace(number, output_dim=width),
    )


def _precision(storage: ModelStorage) -> str | None:
    """Return the type of the bulk of the weights."""
    sizes: Counter[str] = Counter()
    for _, weight in storage.weighted():
        sizes[weight.type] += weight.elements
    kind = sizes.most_common(1)[0][0] if sizes else ""
    return kind if re.fullmatch("fp16|fp32|int[2-8]", kind) else None


def _artifact(root: Path, component: Component, file: Path, storage: ModelStorage) -> Artifact:
    name = file.relative_to(root).as_posix()
    companion = FileEntry.of(root, f"{name}.weight") if storage.weight_file_bytes else None
    return Artifact(
        **dict(FileEntry.of(root, name)),
        kind="mnn",
        component=component,
        precision=_precision(storage),
        storage=storage.summary(),
        companion=companion,
        target_mnn=oldest_reader(storage).version,
    )


def _beside(root: Path, models: Sequence[Path]) -> Iterator[Artifact]:
    for kind, file in beside(models, Path.is_file):
        inside(root, str(file))
        yield Artifact.model_validate({**dict(FileEntry.of(root, file.relative_to(root).as_posix())), "kind": kind})
