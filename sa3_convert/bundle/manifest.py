"""`manifest.json`: what a bundle holds, where it came from, how close each model is; each word and number in bounds."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, computed_field, model_validator

from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import ADAPTED, MOST_RANK, Component, components_of, part_files
from sa3_convert.system.checked_files import sha256_of_all
from sa3_convert.system.files import sha256_file
from sa3_convert.system.untrusted import SMALL, printable

_LONGEST: Final = 200


def of_alphabet(what: str, pattern: str) -> AfterValidator:
    """Return a validator of words of an alphabet."""
    form = re.compile(pattern)

    def held(value: str) -> str:
        if not form.fullmatch(value):
            raise ValueError(f"{value[:80]!r} is {what}")
        return value

    return AfterValidator(held)


def _shown(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"{value[:80]!r} cannot be shown")
    return value


_WORD = "[A-Za-z0-9][A-Za-z0-9._+-]"
Name = Annotated[str, of_alphabet("no name of up to 64 letters, digits and ._+-", f"{_WORD}{{,63}}")]
"""A word that may become part of paths."""
RelativePath = Annotated[
    str,
    Field(max_length=_LONGEST),
    of_alphabet("no plain path, or leaves the bundle", f"{_WORD}*(/{_WORD}*){{,7}}"),
]
Sha256 = Annotated[str, of_alphabet("no SHA-256", "[0-9a-f]{64}")]
Precision = Annotated[str, of_alphabet("no precision", "fp16|fp32|int[2-8]")]
Version = Annotated[str, of_alphabet("no version", r"[0-9]{1,4}(\.[0-9]{1,4}){1,3}")]
Text = Annotated[str, Field(max_length=_LONGEST), AfterValidator(_shown)]
"""What people are shown: where something came from."""
Label = Annotated[str, Field(max_length=1 << 16), AfterValidator(_shown)]
"""What a bundle is called, with its LoRAs."""
Decibels = Annotated[float, Field(ge=-1000, le=1000)]


def as_text(value: str) -> str:
    """Return a name from outside as a manifest can hold it."""
    return printable(value).replace("\n", "\\n")[:_LONGEST]


MANIFEST = "manifest.json"
UNVERIFIED: Final = "UNVERIFIED"
"""What stands for the recipe of models that came without a manifest: nobody has held them to anything."""
RECIPE = "recipe.yaml"
TOKENIZER = "tokenizer.json"
TOKEN_TABLE = "tokenizer.table"
BOTTLENECK = "bottleneck_params.json"

ArtifactKind = Literal[
    "mnn", "onnx", "onnx-int8", "onnx-fp16", "mnn-prepare", "mnn-time", "mnn-step",
    "mnn-slots", "onnx-slots", "onnx-int8-slots", "onnx-fp16-slots",
    "tokenizer", "bottleneck_params", "recipe",
]  # fmt: skip
SPLIT_KINDS: Final[tuple[ArtifactKind, ...]] = ("mnn-prepare", "mnn-time", "mnn-step")
"""A model in parts, in their order: what runs once per generation, the time's embedding, and the rest of every step."""

SLOTS_OF: Final[Mapping[ArtifactKind, ArtifactKind]] = {
    "mnn": "mnn-slots",
    "onnx": "onnx-slots",
    "onnx-int8": "onnx-int8-slots",
    "onnx-fp16": "onnx-fp16-slots",
}
"""Kinds of models → of the same with slots for adapters."""

RIGHT_IN_HALF_DB: Final = 40.0
"""From here on a model may compute with halves: of a model with 30 dB that takes at most 0.4 dB."""

_LONGEST_NAME: Final = 60
_KEPT_OUTSIDE: Final[tuple[ArtifactKind, ...]] = (
    "onnx", "onnx-int8", "onnx-fp16", "onnx-slots", "onnx-int8-slots", "onnx-fp16-slots",
)  # fmt: skip
"""Kinds whose files may be kept outside of the bundle."""
COMPANIONS: Mapping[ArtifactKind, str] = {
    **dict.fromkeys(("mnn", "mnn-slots", *SPLIT_KINDS), ".weight"),
    **dict.fromkeys(_KEPT_OUTSIDE, ".data"),
}
"""Kinds of models, and what is behind their name in that of the file that is loaded with them."""
_SHARED_BYTES: Mapping[ArtifactKind, int] = {"tokenizer": 256 << 20, "bottleneck_params": SMALL, "recipe": SMALL}
"""Kinds of files that belong to no component, and how large each can be."""
_LARGEST_TABLE: Final = 64 << 20


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
    half_db: Decibels | None = None
    """Of a model for MNN: the worst ratio that half inputs and half arithmetic alone leave, emulated. Of a model in
    parts only the last part has them. None is not known."""
    companion: FileEntry | None = None
    """Weights that stand in a file of their own (`.weight` of MNN, `.data` of ONNX)."""
    parts: tuple[FileEntry, ...] = ()
    """Of an ONNX model: graphs over its weights that compute it in parts, and are run; see `components.part_files`."""
    table: FileEntry | None = None
    """Of a tokenizer: the same in a form that loads faster, and is used instead."""
    kept_at: Annotated[str, Field(max_length=4096)] | None = None
    """Folder, relative to the bundle, of a file that is left out of it: the reference ONNX is several times its size.
    The hash says whether it is still the right one."""
    rank: int | None = Field(default=None, ge=1, le=MOST_RANK)
    """Of a model with slots for adapters: the rank that they have room for."""
    target_mnn: Version | None = None
    """Of a `.mnn`: the oldest MNN that its graph was made to be right on."""
    fingerprint: Sha256 | None = None
    """Of everything that went into it, by content."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        suffix = COMPANIONS.get(self.kind)
        if (suffix is None) is not (self.component is None):
            raise ValueError(f"{self.kind} is {'no model' if suffix is None else 'a model'} of a component")
        if self.kind in SPLIT_KINDS and self.component is not Component.DIT:
            raise ValueError("only a dit is in parts")
        has_slots = self.kind in SLOTS_OF.values()
        if (self.rank is not None) is not has_slots or (has_slots and self.component not in ADAPTED):
            raise ValueError(f"{self.kind} of {self.component} has slots of rank {self.rank}")
        # A model's other file is loaded by a name that is made from its own: no other name would be what is checked.
        if self.companion is not None and self.companion.path != f"{self.path}{suffix}":
            raise ValueError(f"what belongs to {self.path} is not {self.companion.path}")
        known = part_files(self.component, self.path) if self.kind in ("onnx-int8", "onnx-int8-slots") else {}
        if self.parts and [part.path for part in self.parts] != [*known]:
            raise ValueError(f"{self.parts[0].path} is no part of {self.path}")
        # Read alone, and only what has the hash; so it matters little where a hostile one leads.
        if self.kept_at is not None and self.kind not in _KEPT_OUTSIDE:
            raise ValueError("only ONNX files are kept outside of the bundle")
        if self.table is not None and (self.kind != "tokenizer" or self.table.bytes > _LARGEST_TABLE):
            raise ValueError(f"a {self.kind} has no table of {self.table.bytes} bytes")
        if self.bytes > _SHARED_BYTES.get(self.kind, self.bytes):
            raise ValueError(f"a {self.kind} of {self.bytes} bytes is none")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def lowest_precision(self) -> Literal["low", "normal"] | None:
        """The coarsest precision at which MNN runs a model right, of one in parts the last; None of other files."""
        if not self.kind.startswith("mnn"):
            return None
        return "low" if self.half_db is not None and self.half_db >= RIGHT_IN_HALF_DB else "normal"

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The file and what belongs to it."""
        return tuple(entry for entry in (self, self.companion, *self.parts, self.table) if entry is not None)

    @property
    def content(self) -> str:
        """SHA-256 of it and all that belongs to it; see `sha256_of_all`."""
        return sha256_of_all([entry.sha256 for entry in self.files])

    @property
    def total_bytes(self) -> int:
        """How large they are together."""
        return sum(entry.bytes for entry in self.files)

    def moved(self, path: str) -> Self:
        """Return it at another place of the bundle, and what belongs to it beside it."""

        def at(entry: FileEntry | None, name: str) -> FileEntry | None:
            return entry and entry.model_copy(update={"path": name})

        beside = {
            "companion": at(self.companion, f"{path}{COMPANIONS.get(self.kind)}"),
            "parts": tuple(map(at, self.parts, part_files(self.component, path))),
            "table": at(self.table, str(PurePosixPath(path).with_suffix(".table"))),
        }
        return self.model_copy(update={"path": path, "kept_at": None, **beside})


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
    revision: Annotated[str, of_alphabet("no commit", "[0-9a-f]{40}")] | None = None
    """The hub's commit that it was fetched from; None is not known."""
    synthetic: bool = False
    """Whether its weights are random numbers that `checkpoint synthesize` made."""


class Manifest(_Data):
    """The whole `manifest.json`. No word of it is used before it was held to an alphabet, and no number to bounds."""

    schema_version: Literal[1] = Field(alias="schema")
    base: Literal[".", "..", "../.."] = "."
    """Folder that all paths are relative to, and lie in, seen from the manifest's: exported bundles share files."""
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

    def models(
        self, kind: ArtifactKind, *, split: bool = False, slots: bool = False
    ) -> dict[Component, tuple[Artifact, ...]]:
        """Return the models of a kind; in place of the plain ones those with slots, or the DiT in parts, if wanted."""
        kinds = (kind, SLOTS_OF[kind]) if slots else (kind,)
        found: dict[Component, tuple[Artifact, ...]]
        found = {a.component: (a,) for one in kinds for a in self.artifacts if a.kind == one and a.component}
        if split:
            found[Component.DIT] = tuple(a for one in SPLIT_KINDS for a in self.artifacts if a.kind == one)
        return found

    def opened_bytes(self, kind: ArtifactKind, *, split: bool = False, adapters: bool = False) -> int:
        """Return how large the models of a kind are that are opened: with adapters those that have slots, too."""
        sets = [self.models(kind, split=split), *([self.models(kind, slots=True)] if adapters else [])]
        return sum({a.path: a.total_bytes for models in sets for own in models.values() for a in own}.values())

    @property
    def is_foreign(self) -> bool:
        """Whether it was made up for models that came without one."""
        return self.recipe == UNVERIFIED

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
