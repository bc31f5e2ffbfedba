"""`manifest.json`: what a bundle holds, where it came from, and how close each model is to its reference."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sa3_convert.bundle.words import (
    Decibels,
    Name,
    Precision,
    RelativePath,
    Sha256,
    Text,
    Version,
    of_alphabet,
)
from sa3_convert.checkpoint.layout import CheckpointLayout
from sa3_convert.components import Component, components_of
from sa3_convert.errors import BundleError, Sa3Error
from sa3_convert.files import CheckedFile, FileState, HeldFolder, inside, named, sha256_file, write_text
from sa3_convert.untrusted import SMALL, NotAFileError, parse_json, read_text

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
TOKENIZER = "tokenizer.json"
BOTTLENECK = "bottleneck_params.json"

ArtifactKind = Literal[
    "mnn", "onnx", "onnx-int8", "mnn-prepare", "mnn-step", "tokenizer", "bottleneck_params", "recipe"
]
SPLIT_KINDS: Final[tuple[ArtifactKind, ArtifactKind]] = ("mnn-prepare", "mnn-step")
"""A model in two parts: what runs once per generation, and what runs in every step."""

_LONGEST_NAME: Final = 60
_KEPT_OUTSIDE = ("onnx", "onnx-int8")
"""Kinds whose files may be kept outside of the bundle."""
_COMPANIONS: Mapping[ArtifactKind, str] = {
    "mnn": ".weight",
    "mnn-prepare": ".weight",
    "mnn-step": ".weight",
    "onnx": ".data",
    "onnx-int8": ".data",
}
"""Kinds of models, and what is behind their name in that of the file that is loaded with them."""
_SHARED_BYTES: Mapping[ArtifactKind, int] = {"tokenizer": 256 << 20, "bottleneck_params": SMALL, "recipe": SMALL}
"""Kinds of files that belong to no component, and how large each can be."""


class _Data(BaseModel):
    # More keys may be added by later versions; the ones here stay.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class FileEntry(_Data):
    """One file, its path relative to the bundle."""

    path: RelativePath
    sha256: Sha256
    bytes: int = Field(ge=0, le=16 << 40)

    @classmethod
    def of(cls, folder: Path, path: str) -> "FileEntry":
        """Describe the file that stands at `path` inside `folder`."""
        file = folder / path
        return cls(path=path, sha256=sha256_file(file), bytes=file.stat().st_size)


class Fidelity(_Data):
    """The worst figures over all inputs that were compared."""

    signal_to_noise_db: Decibels
    cosine: float = Field(ge=-2, le=2)
    max_abs_error: float = Field(ge=0)


class _StoredTotal(_Data):
    bytes: int = Field(ge=0, le=16 << 40)
    scale_bytes: int = Field(ge=0, le=16 << 40)


class _Storage(_Data):
    types: dict[Name, _StoredTotal]


def _summary(value: dict[str, Any]) -> dict[str, Any]:
    """Hold the part of a summary that is read to its form; the rest is only ever compared as a whole."""
    _Storage.model_validate(value, strict=True)
    return value


class Artifact(FileEntry):
    """A file and what is known of it."""

    kind: ArtifactKind
    component: Component | None = None
    precision: Precision | None = None
    storage: Annotated[dict[str, Any], AfterValidator(_summary)] | None = None
    """Summary of the audit: what the file really holds."""
    fidelity: Fidelity | None = None
    floor_db: Decibels | None = None
    companion: FileEntry | None = None
    """Weights that stand in a file of their own (`.weight` of MNN, `.data` of ONNX)."""
    kept_at: Annotated[str, Field(max_length=4096)] | None = None
    """Folder, relative to the bundle, of a file that is left out of it: the reference ONNX is several times its size.
    The hash says whether it is still the right one."""
    target_mnn: Version | None = None
    """Of a `.mnn`: the oldest MNN that its graph was made to be right on."""
    fingerprint: Sha256 | None = None
    """Of everything that went into it, by content."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        suffix = _COMPANIONS.get(self.kind)
        if (suffix is None) is not (self.component is None):
            raise ValueError(f"{self.kind} is {'no model' if suffix is None else 'a model'} of a component")
        if self.kind in SPLIT_KINDS and self.component is not Component.DIT:
            raise ValueError("only a dit is in two parts")
        # A model's other file is loaded by a name that is made from its own: no other name would be what is checked.
        if self.companion is not None and self.companion.path != f"{self.path}{suffix}":
            raise ValueError(f"what belongs to {self.path} is not {self.companion.path}")
        # Read alone, and only what has the hash; so it matters little where a hostile one leads.
        if self.kept_at is not None and self.kind not in _KEPT_OUTSIDE:
            raise ValueError("only ONNX files are kept outside of the bundle")
        if self.bytes > _SHARED_BYTES.get(self.kind, self.bytes):
            raise ValueError(f"a {self.kind} of {self.bytes} bytes is none")
        return self

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The file and its companion."""
        return (self,) if self.companion is None else (self, self.companion)


class LoraEntry(_Data):
    """An adapter that is in the weights, in the order in which they were applied."""

    name: Annotated[Text, of_alphabet("no name of a file", "[^/]*[^/.][^/]*")]
    """Of its file."""
    sha256: Sha256
    strength: float
    type: Name
    rank: int = Field(ge=0, le=1 << 20)
    alpha: float
    layers: dict[Component, Annotated[int, Field(ge=0, le=1 << 20)]]
    """How many layers of each component it changes; none at strength 0."""

    @property
    def label(self) -> str:
        """Its name, strength, and the start of its hash: names alone prove nothing."""
        return f"{self.name[:_LONGEST_NAME]}:{self.strength:g} ({self.sha256[:12]})"


class CheckpointOrigin(_Data):
    """The checkpoint behind a bundle."""

    source: Text = "unknown"
    """The hub id that it names as its own, or its folder."""
    digests: dict[Component, Sha256] = Field(default_factory=dict)
    """Of each component's tensors."""


class Manifest(_Data):
    """The whole `manifest.json`. No word of it is used before it was held to an alphabet, and no number to bounds."""

    schema_version: Literal[1] = Field(alias="schema")
    variant: Name
    recipe: Name
    checkpoint: CheckpointOrigin
    loras: tuple[LoraEntry, ...] = Field(default=(), max_length=1000)
    tools: dict[Name, Text] = Field(max_length=1000)
    """Versions of everything that took part."""
    layout: CheckpointLayout
    """All dimensions: what a runtime needs to know without the checkpoint."""
    artifacts: tuple[Artifact, ...]

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_of_a_kind(self) -> Self:
        seen = [(a.component, a.kind) for a in self.artifacts]
        if len(seen) != len(set(seen)):
            raise ValueError("two artifacts are of the same component and kind")
        # Where the file system does not tell cases apart, these are one file.
        paths = [MANIFEST, *(entry.path.lower() for a in self.artifacts for entry in a.files)]
        if len(paths) != len(set(paths)):
            raise ValueError("two files have the same path")
        if foreign := {a.component for a in self.artifacts} - {None, *components_of(self.layout)}:
            raise ValueError(f"the layout has no {', '.join(sorted(str(component) for component in foreign))}")
        return self

    @property
    def label(self) -> str:
        """The variant and the adapters that are in it: what tells a bundle from the plain one wherever it is named."""
        return " + ".join((self.variant, *(lora.label for lora in self.loras)))

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    @property
    def digest(self) -> str:
        """The hex SHA-256 of its text: what a bundle is."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class Bundle:
    """A folder with a manifest.

    The folder is held open, so that manifest and files are of one bundle whatever comes to stand under its name. A file
    that was checked once is afterwards only asked whether it is still the same.

    Raises:
        OSError: there is no such folder.

    """

    def __init__(self, path: Path, manifest: Manifest, folder: HeldFolder | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self._folder = HeldFolder(path) if folder is None else folder
        self._checked: dict[str, CheckedFile] = {}

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read a bundle's manifest; the files themselves are looked at by `check`.

        Raises:
            BundleError: no bundle stands there, or its manifest is damaged.

        """
        file = path / MANIFEST
        try:
            folder = HeldFolder(path)
            inside(folder.root, MANIFEST)
            text = read_text(folder.root / MANIFEST)
            # Twice: what pydantic would take in silence (two keys of one name, numbers without end) is refused first.
            parse_json(text)
            return cls(path, Manifest.model_validate_json(text, strict=True), folder)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(f"{path} is no bundle: {file} does not exist. `sa3-convert convert` makes one.") from None
        except OSError as error:
            raise BundleError(f"{file} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise BundleError(f"{file} is damaged: {where[:200]}: {first['msg'][:500]}. Convert again.") from None
        except ValueError as error:
            raise BundleError(f"{file} is damaged: {str(error)[:500]}. Convert again.") from None

    @property
    def layout(self) -> CheckpointLayout:
        """Dimensions of the checkpoint that the bundle was made from."""
        return self.manifest.layout

    @property
    def components(self) -> tuple[Component, ...]:
        """The components for which the bundle has a model, in pipeline order."""
        return tuple(c for c in Component if any(a.component is c and a.kind == "mnn" for a in self.manifest.artifacts))

    def artifact(self, component: Component | None, kind: ArtifactKind = "mnn") -> Artifact:
        """Return an artifact.

        Raises:
            BundleError: the bundle does not have it.

        """
        for artifact in self.manifest.artifacts:
            if artifact.component is component and artifact.kind == kind:
                return artifact
        what = kind if component is None else f"{kind} of component {component.value!r}"
        raise BundleError(f"Bundle {self.path} has no {what}.")

    def file(self, component: Component | None, kind: ArtifactKind = "mnn") -> Path:
        """Return the name of an artifact's file, for people; `checked` gives the file that the manifest describes."""
        artifact = self.artifact(component, kind)
        return self._named(artifact, artifact)

    def all_files(self) -> Iterator[Path]:
        """Yield the names of the manifest and of every file that it lists."""
        yield self.path / MANIFEST
        for artifact in self.manifest.artifacts:
            yield from (self._named(artifact, entry) for entry in artifact.files)

    def checked(self, component: Component | None, kind: ArtifactKind = "mnn", *, contents: bool = True) -> CheckedFile:
        """Return an artifact's file, its companion with it; see `check`."""
        return self._check(self.artifact(component, kind), contents)

    @contextlib.contextmanager
    def reading(self, kind: ArtifactKind) -> Iterator[Path]:
        """Yield the path of a checked file that belongs to no component; it must still be the same after the block.

        Raises:
            BundleError: see `check`, or it was replaced meanwhile.

        """
        file = self.checked(None, kind)
        try:
            yield file.path
        except Sa3Error as error:
            raise type(error)(str(error).replace(str(file.path), str(named(file.path)))) from None
        file.require_unchanged()

    def check(
        self,
        components: tuple[Component, ...] | None = None,
        kinds: tuple[str, ...] = ("mnn",),
        *,
        contents: bool = True,
    ) -> None:
        """Compare files with the manifest: presence, size, SHA-256. Files without a component are always checked.

        Args:
            components: whose files; None is all.
            kinds: of the files.
            contents: read the files for their SHA-256; without it only what the folder lists is compared.

        Raises:
            BundleError: one is missing, leads out of the bundle, is not what the manifest says, or not any more; the
                message names it.

        """
        for artifact in self.manifest.artifacts:
            if artifact.component is None or (
                artifact.kind in kinds and (components is None or artifact.component in components)
            ):
                self._check(artifact, contents)

    def _check(self, artifact: Artifact, contents: bool) -> CheckedFile:
        companion = None
        if artifact.companion is not None:
            companion = self._check_file(artifact, artifact.companion, contents)
        return self._check_file(artifact, artifact, contents, companion)

    def _check_file(
        self, artifact: Artifact, entry: FileEntry, contents: bool, companion: CheckedFile | None = None
    ) -> CheckedFile:
        if (known := self._checked.get(entry.path)) is not None:
            known.require_unchanged()
            return known
        name, file = self._named(artifact, entry), self._reached(artifact, entry)
        try:
            state = FileState.at(file)
            if state.size == entry.bytes and contents:
                found = CheckedFile.read(file, within=self._folder, companion=companion)
            else:
                found = CheckedFile(file, entry.sha256, state, companion, (self._folder,))
        except NotAFileError:
            raise BundleError(f"{name} is no regular file. Convert again.") from None
        except OSError:
            why = (
                "although the manifest lists it. Convert again."
                if artifact.kept_at is None
                else "where the bundle's conversion kept it. Convert again (--with-reference puts it into the bundle)."
            )
            raise BundleError(f"{name} is missing {why}") from None
        if state.size != entry.bytes or found.sha256 != entry.sha256:
            raise BundleError(f"{name} is not the file that the manifest describes (size or SHA-256). Convert again.")
        if contents:
            self._checked[entry.path] = found
        return found

    def _named(self, artifact: Artifact, entry: FileEntry) -> Path:
        if artifact.kept_at is None:
            return self.path / entry.path
        return self.path / artifact.kept_at / Path(entry.path).name

    def _reached(self, artifact: Artifact, entry: FileEntry) -> Path:
        """Return the path by which a file is reached, whatever the bundle's name leads to by now."""
        if artifact.kept_at is None:
            inside(self._folder.root, entry.path)
            return self._folder.root / entry.path
        return Path(os.path.realpath(self._folder.root / artifact.kept_at)) / Path(entry.path).name

    def is_whole(self, artifact: Artifact) -> bool:
        """Tell whether an artifact's files are there and are what the manifest says, to the last byte."""
        try:
            self._check(artifact, contents=True)
        except (BundleError, OSError, ValueError):
            return False
        return True

    def write(self) -> None:
        """Write the manifest; the last thing that happens to a bundle, so that it never describes what is not there."""
        inside(self.path, MANIFEST)
        write_text(self.path / MANIFEST, self.manifest.to_json())
