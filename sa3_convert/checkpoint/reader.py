"""A checkpoint folder, checked before anything long: files, names, shapes and types when opened, values on demand."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from sa3_convert.checkpoint.config import CONFIG, TEXT_ENCODER_FOLDER, read_layout
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.json_file import Picked, held, read_json
from sa3_convert.checkpoint.lora import Lora, merged, open_loras
from sa3_convert.checkpoint.lora_file import LoraRequest
from sa3_convert.checkpoint.tensor_file import WEIGHTS, Scratch, StoredTensor, TensorFile, open_weights, refuse_pointer
from sa3_convert.checkpoint.tensors import (
    AUTOENCODER_PREFIX,
    DIT_PREFIX,
    PROMPT_PREFIX,
    SECONDS_PREFIX,
    TEXT_ENCODER_PREFIX,
    expected_tensors,
    expected_text_encoder_tensors,
    is_leftover,
)
from sa3_convert.checkpoint.variants import MINIATURE, PINNED, VARIANTS, Variant, name_of, recognise
from sa3_convert.components import Component, components_of
from sa3_convert.errors import CheckpointError, UsageError
from sa3_convert.hub.files import COMMIT, CachedSnapshot, HubId, cached_commit
from sa3_convert.system.machine import usable_processors
from sa3_convert.system.sealed import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_convert.runtime.prompts import UsedTokenizer

TOKENIZER = "tokenizer.json"
SOURCE = "source.json"
"""What says where a checkpoint's files are from, if `checkpoint` made them."""
_LARGEST_TOKENIZER = 128 << 20
"""Bytes; the published one has a quarter of it."""


class Source(Picked):
    """What `source.json` says of the files beside it."""

    revision: str | None = Field(default=None, pattern=f"^{COMMIT.pattern}$")
    """The hub's commit."""
    synthetic: bool = False
    """Whether the weights are random numbers."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a component's tensors are: those of `file` that start with one of `keep`, without `strip`; no leftovers."""

    file: TensorFile
    strip: str
    keep: tuple[str, ...]

    def names(self) -> dict[str, str]:
        return {
            name: name.removeprefix(self.strip)
            for name, entry in self.file.entries.items()
            if name.startswith(self.keep) and not is_leftover(name, entry.stored)
        }


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint whose files fit its configuration. Made by `Checkpoint.open`."""

    folder: Path
    layout: CheckpointLayout
    weights: TensorFile
    text_encoder: TensorFile | None
    tokenizer: "UsedTokenizer | None" = None
    """How the reference uses the text encoder's tokenizer."""
    loras: tuple[Lora, ...] = ()
    """Adapters that are in the values that `state` returns, in the order in which they are applied."""
    _digests: dict[Component, str] = field(default_factory=dict, repr=False, compare=False)
    """Of the files' own tensors, without adapters."""

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Open a checkpoint folder and check every header.

        Raises:
            CheckpointError: a file is missing, damaged, a git-lfs pointer, or holds other tensors than its config
                says; or a setting is not supported. The message names what.

        """
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise CheckpointError(f"Checkpoint {folder} {what}. Give the folder that holds {CONFIG} and {WEIGHTS}.")
        refuse_pointer(folder / CONFIG)
        text_folder = folder / TEXT_ENCODER_FOLDER
        if text_folder.is_dir():
            for name in ("config.json", TOKENIZER):
                refuse_pointer(text_folder / name)
        layout = read_layout(folder)
        weights = open_weights(folder)
        weights.require(expected_tensors(layout))
        text_encoder = tokenizer = None
        if layout.text_encoder is not None:
            text_encoder = open_weights(text_folder)
            text_encoder.require(expected_text_encoder_tensors(layout.text_encoder), within=TEXT_ENCODER_PREFIX)
            from sa3_convert.runtime.prompts import check_tokenizer

            tokenizer = check_tokenizer(text_folder / TOKENIZER, layout.text_encoder)
        return cls(folder, layout, weights, text_encoder, tokenizer)

    def with_loras(self, requests: Sequence[LoraRequest]) -> "Checkpoint":
        """Return this checkpoint with adapters in it; their headers are checked now, weights are merged when read.

        Raises:
            LoraError: a file is not an adapter for this checkpoint; the message says why.
            CheckpointError: a file is missing or damaged.
            UsageError: a file is given twice.

        """
        return replace(self, loras=open_loras(requests, self.weights, f"{self.folder} ({self.variant_name})"))

    def loras_of(self, component: Component) -> tuple[Lora, ...]:
        """Return the adapters that change a component, in the order in which they are applied."""
        return tuple(lora for lora in self.loras if component in self.layers_changed(lora))

    def layers_changed(self, lora: Lora) -> dict[Component, int]:
        """Return how many layers an adapter changes, by component; one that it leaves alone is not there."""
        counts = {
            component: sum(lora.changes(name) for part in self._parts(component) for name in part.names())
            for component in components_of(self.layout)
        }
        return {component: count for component, count in counts.items() if count}

    @property
    def source(self) -> Source:
        """Where its files are from, as far as that is known."""
        if (self.folder / SOURCE).exists():
            return held(Source, read_json(self.folder / SOURCE), SOURCE)
        folder = self.folder.absolute()
        cached = folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name)
        return Source(revision=folder.name if cached else None)

    @property
    def variant(self) -> Variant | None:
        """The published variant that this is, or None."""
        return recognise(self.layout)

    @property
    def variant_name(self) -> str:
        """Its name; `custom-…` for a checkpoint that is none of the published ones."""
        return name_of(self.layout)

    def _parts(self, component: Component) -> tuple[_Part, ...]:
        if component not in components_of(self.layout):
            raise UsageError(f"{self.folder} holds an autoencoder alone; it has no component {component.value!r}.")
        auto = AUTOENCODER_PREFIX if self.layout.dit is not None else ""
        match component:
            case Component.TEXT_ENCODER:
                assert self.text_encoder is not None
                return (
                    _Part(self.text_encoder, TEXT_ENCODER_PREFIX, (TEXT_ENCODER_PREFIX,)),
                    _Part(self.weights, PROMPT_PREFIX, (PROMPT_PREFIX,)),
                )
            case Component.NUMBER_CONDITIONER:
                return (_Part(self.weights, SECONDS_PREFIX, (SECONDS_PREFIX,)),)
            case Component.DIT:
                return (_Part(self.weights, DIT_PREFIX, (DIT_PREFIX,)),)
            case Component.DECODER:
                return (_Part(self.weights, auto, (f"{auto}decoder.", f"{auto}bottleneck.")),)
            case Component.ENCODER:
                return (_Part(self.weights, f"{auto}encoder.", (f"{auto}encoder.",)),)

    def state(self, component: Component, *, scratch: Path | None = None) -> "dict[str, Tensor]":
        """Return a component's tensors by the network's parameter names.

        Args:
            component: which one.
            scratch: folder with room for the weights that adapters change and those of half precision, in float32.
                When not given, the former are in the system's own for temporary files and the latter in memory.
                Nothing is left in it.

        Returns:
            float32 tensors. Those that are stored as float32 are views of the mapped file: they cost memory only when
            read, and so do those in `scratch`. BF16 and F16 are widened, which is exact.

        Raises:
            UsageError: this checkpoint has no such component.
            LoraError: a weight is not finite with the adapters in it.

        """
        state: dict[str, Tensor] = {}
        room = Scratch(scratch)
        for part in self._parts(component):
            state |= part.file.tensors(part.names(), None if scratch is None else room)
        if loras := self.loras_of(component):
            for name, to in (pair for part in self._parts(component) for pair in part.names().items()):
                if any(lora.changes(name) for lora in loras):
                    state[to] = room.kept(merged(name, state[to], loras))
        return state

    def stored(self, component: Component) -> dict[str, StoredTensor]:
        """Return how a component's tensors are stored, by the network's parameter names; sizes without reading them."""
        return {to: part.file.entries[name] for part in self._parts(component) for name, to in part.names().items()}

    def digest(self, component: Component) -> str:
        """Return the hex SHA-256 over a component's sorted names, types, shapes and bytes, whatever file holds them.

        With adapters that change the component it is one over that, their files and their strengths.
        """
        if component not in self._digests:
            self._digests[component] = self._digest(component)
        own = self._digests[component]
        loras = [[lora.file.sha256, lora.strength] for lora in self.loras_of(component)]
        return fingerprint(weights=own, loras=loras) if loras else own

    def _digest(self, component: Component) -> str:
        places = {to: (part.file, name) for part in self._parts(component) for name, to in part.names().items()}
        names = sorted(places)
        with ThreadPoolExecutor(min(8, usable_processors())) as pool:
            hashes = pool.map(lambda name: places[name][0].sha256(places[name][1]), names)
            whole = hashlib.sha256()
            for name, content in zip(names, hashes, strict=True):
                entry = places[name][0].entries[places[name][1]]
                whole.update(f"{name} {entry.stored} {list(entry.shape)} {content}\n".encode())
        return whole.hexdigest()

    def check_values(self, component: Component) -> None:
        """Check that every value of a component is finite.

        Raises:
            CheckpointError: one is not; the message names the tensor and the index.

        """
        for part in self._parts(component):
            for name in part.names():
                part.file.require_finite(name)


def resolve_checkpoint(text: str) -> Path:
    """Return the folder of a checkpoint.

    Args:
        text: an existing path, or `org/name[@revision]` as fetched into the Hugging Face cache before. Without a
            revision the pinned one of a published variant is taken if it is there, else what `main` was when fetched.
            The miniature's id is always there: it comes with this package.

    Raises:
        CheckpointError: there is no such path and no such cached checkpoint; the message says how to get it. Or a file
            in the cache is not what its blob's name says.

    """
    path = Path(text).expanduser()
    if text and path.exists():
        return path
    if text == MINIATURE:
        return Path(__file__).with_name("miniature")
    meant = HubId.parse(text)
    if meant is None or meant.folder:
        raise CheckpointError(f"Checkpoint {text!r} does not exist.{_hint(text)}")
    hub_id, revision = meant.repository, meant.revision
    for candidate in [revision] if revision else [PINNED.get(hub_id, "main"), "main"]:
        folder = _cached(hub_id, candidate)
        if folder is not None:
            return folder
    where = f" at revision {revision}" if revision else ""
    raise CheckpointError(
        f"{text} is neither a folder nor a checkpoint in the local Hugging Face cache{where}. "
        f"Download it: sa3-convert checkpoint fetch {hub_id} DIR{f' --revision {revision}' if revision else ''}"
    )


def _hint(text: str) -> str:
    variant = VARIANTS.get(text)
    if variant is None:
        return " Give the folder that holds model_config.json and model.safetensors, or a hub id (org/name)."
    return (
        f" To try that variant with random weights: sa3-convert checkpoint synthesize DIR --variant {text}. "
        f"To download it: sa3-convert checkpoint fetch {variant.hub_id} DIR"
    )


def _cached(hub_id: str, revision: str) -> Path | None:
    """Return a snapshot of the cache, whose files are what their blobs' names say."""
    commit = cached_commit(hub_id, revision)
    if commit is None:
        return None
    snapshot = CachedSnapshot(hub_id, commit)
    if "model_config.json" not in snapshot:
        return None
    for damaged in snapshot.damaged():
        raise CheckpointError(
            f"{damaged} is damaged: its content is not what its name in the cache says. Remove it, and download it "
            f"again: sa3-convert checkpoint fetch {hub_id} DIR --revision {commit}"
        )
    return snapshot.folder
