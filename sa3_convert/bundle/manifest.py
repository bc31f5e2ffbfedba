"""`manifest.json`: what a bundle holds, where it came from, and how close each model is to its reference."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from sa3_convert.checkpoint.layout import CheckpointLayout
from sa3_convert.components import Component
from sa3_convert.errors import BundleError
from sa3_convert.files import sha256_file, write_text

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
TOKENIZER = "tokenizer.json"
BOTTLENECK = "bottleneck_params.json"

ArtifactKind = Literal[
    "mnn", "onnx", "onnx-int8", "mnn-prepare", "mnn-step", "tokenizer", "bottleneck_params", "recipe"
]
SPLIT_KINDS: Final[tuple[ArtifactKind, ArtifactKind]] = ("mnn-prepare", "mnn-step")
"""A model in two parts: what runs once per generation, and what runs in every step."""

_LAYOUT: TypeAdapter[CheckpointLayout] = TypeAdapter(CheckpointLayout)


class _Data(BaseModel):
    # More keys may be added by later versions; the ones here stay.
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileEntry(_Data):
    """One file, its path relative to the bundle."""

    path: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        path = Path(value)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"{value!r} leaves the bundle")
        return value

    @classmethod
    def of(cls, folder: Path, path: str) -> "FileEntry":
        """Describe the file that stands at `path` inside `folder`."""
        file = folder / path
        return cls(path=path, sha256=sha256_file(file), bytes=file.stat().st_size)


class Fidelity(_Data):
    """The worst figures over all inputs that were compared."""

    signal_to_noise_db: float
    cosine: float
    max_abs_error: float


class Artifact(FileEntry):
    """A file and what is known of it."""

    kind: ArtifactKind
    component: Component | None = None
    precision: str | None = None
    storage: dict[str, Any] | None = None
    """Summary of the audit: what the file really holds."""
    fidelity: Fidelity | None = None
    floor_db: float | None = None
    companion: FileEntry | None = None
    """Weights that stand in a file of their own (`.weight` of MNN, `.data` of ONNX)."""
    kept_at: str | None = None
    """Folder, relative to the bundle, of a file that is left out of it: the reference ONNX is several times its size.
    The hash says whether it is still the right one."""
    target_mnn: str | None = None
    """Of a `.mnn`: the oldest MNN that its graph was made to be right on."""
    fingerprint: str | None = None
    """Of everything that went into it, by content."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The file and its companion."""
        return (self,) if self.companion is None else (self, self.companion)


class LoraEntry(_Data):
    """An adapter that is in the weights, in the order in which they were applied."""

    name: str
    """Of its file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    strength: float
    type: str
    rank: int
    alpha: float
    layers: dict[Component, int]
    """How many layers of each component it changes; none at strength 0."""


class Manifest(_Data):
    """The whole `manifest.json`."""

    schema_version: Literal[1] = Field(alias="schema")
    variant: str
    recipe: str
    checkpoint: dict[str, Any]
    """`source` and, per component, the digest of its tensors."""
    loras: tuple[LoraEntry, ...] = ()
    tools: dict[str, str]
    """Versions of everything that took part."""
    layout: CheckpointLayout
    """All dimensions: what a runtime needs to know without the checkpoint."""
    artifacts: tuple[Artifact, ...]

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    @model_validator(mode="after")
    def _one_of_a_kind(self) -> Self:
        seen = [(a.component, a.kind) for a in self.artifacts]
        if len(seen) != len(set(seen)):
            raise ValueError("two artifacts are of the same component and kind")
        return self

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


class Bundle:
    """A folder with a manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read a bundle's manifest; the files themselves are looked at by `check`.

        Raises:
            BundleError: no bundle stands there, or its manifest is damaged.

        """
        file = path / MANIFEST
        try:
            text = file.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(f"{path} is no bundle: {file} does not exist. `sa3-convert convert` makes one.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{file} cannot be read: {error}") from None
        try:
            return cls(path, Manifest.model_validate_json(text))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise BundleError(f"{file} is damaged: {where}: {first['msg']}. Convert again.") from None

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
        """Return the path of an artifact's file; `check` tells whether it is what the manifest says."""
        return self._locate(self.artifact(component, kind))

    def all_files(self) -> Iterator[Path]:
        """Yield the manifest's path and that of every file that it lists."""
        yield self.path / MANIFEST
        for artifact in self.manifest.artifacts:
            yield from (self._locate(artifact, entry) for entry in artifact.files)

    def _locate(self, artifact: Artifact, entry: FileEntry | None = None) -> Path:
        """Return where an artifact's file, or its companion, stands."""
        entry = entry or artifact
        if artifact.kept_at is None:
            return self.path / entry.path
        return self.path / artifact.kept_at / Path(entry.path).name

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
            BundleError: one is missing or is not what the manifest says; the message names it.

        """
        for artifact in self.manifest.artifacts:
            if artifact.component is not None and (
                artifact.kind not in kinds or (components is not None and artifact.component not in components)
            ):
                continue
            for entry in artifact.files:
                self._check_file(artifact, entry, contents)

    def _check_file(self, artifact: Artifact, entry: FileEntry, contents: bool) -> None:
        file = self._locate(artifact, entry)
        try:
            size = file.stat().st_size
        except OSError:
            why = (
                "although the manifest lists it. Convert again."
                if artifact.kept_at is None
                else "where the bundle's conversion kept it. Convert again (--with-reference puts it into the bundle)."
            )
            raise BundleError(f"{file} is missing {why}") from None
        if size != entry.bytes or (contents and sha256_file(file) != entry.sha256):
            raise BundleError(f"{file} is not the file that the manifest describes (size or SHA-256). Convert again.")

    def write(self) -> None:
        """Write the manifest; the last thing that happens to a bundle, so that it never describes what is not there."""
        write_text(self.path / MANIFEST, self.manifest.to_json())
