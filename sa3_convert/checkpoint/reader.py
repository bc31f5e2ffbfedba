"""A checkpoint folder, checked before anything long: files, names, shapes and types when opened, values on demand."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_convert.checkpoint.layout import TEXT_ENCODER_FOLDER, CheckpointLayout, read_json, read_layout
from sa3_convert.checkpoint.resolve import resolve_checkpoint
from sa3_convert.checkpoint.tensor_file import StoredTensor, TensorFile, refuse_pointer
from sa3_convert.checkpoint.tensors import (
    AUTOENCODER_PREFIX,
    DIT_PREFIX,
    PROMPT_PREFIX,
    SECONDS_PREFIX,
    TEXT_ENCODER_PREFIX,
    expected_tensors,
    expected_text_encoder_tensors,
)
from sa3_convert.checkpoint.variants import Variant, name_of, recognise
from sa3_convert.components import Component, components_of
from sa3_convert.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "resolve_checkpoint"]

CONFIG = "model_config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a component's tensors are: those of `file` that start with one of `keep`, without `strip`."""

    file: TensorFile
    strip: str
    keep: tuple[str, ...]

    def names(self) -> dict[str, str]:
        return {name: name.removeprefix(self.strip) for name in self.file.entries if name.startswith(self.keep)}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint whose files fit its configuration. Made by `Checkpoint.open`."""

    folder: Path
    layout: CheckpointLayout
    weights: TensorFile
    text_encoder: TensorFile | None
    _digests: dict[Component, str] = field(default_factory=dict, repr=False, compare=False)

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
        weights = TensorFile(folder / WEIGHTS)
        weights.require(expected_tensors(layout))
        text_encoder = None
        if layout.text_encoder is not None:
            text_encoder = TensorFile(text_folder / WEIGHTS)
            text_encoder.require(expected_text_encoder_tensors(layout.text_encoder), within=TEXT_ENCODER_PREFIX)
            _check_tokenizer(text_folder / TOKENIZER, layout.text_encoder.vocab_size)
        return cls(folder, layout, weights, text_encoder)

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

    def state(self, component: Component) -> "dict[str, Tensor]":
        """Return a component's tensors by the network's parameter names.

        Returns:
            float32 tensors. Those that are stored as float32 are views of the mapped file: they cost memory only when
            read. BF16 and F16 are widened, which is exact.

        Raises:
            UsageError: this checkpoint has no such component.

        """
        state: dict[str, Tensor] = {}
        for part in self._parts(component):
            state |= part.file.tensors(part.names())
        return state

    def stored(self, component: Component) -> dict[str, StoredTensor]:
        """Return how a component's tensors are stored, by the network's parameter names; sizes without reading them."""
        return {to: part.file.entries[name] for part in self._parts(component) for name, to in part.names().items()}

    def digest(self, component: Component) -> str:
        """Return the hex SHA-256 over a component's sorted names, types, shapes and bytes, whatever file holds them."""
        if component not in self._digests:
            self._digests[component] = self._digest(component)
        return self._digests[component]

    def _digest(self, component: Component) -> str:
        places = {to: (part.file, name) for part in self._parts(component) for name, to in part.names().items()}
        names = sorted(places)
        with ThreadPoolExecutor(_THREADS) as pool:
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


def _check_tokenizer(path: Path, vocab_size: int) -> None:
    """Check that the tokenizer is one and gives no id that the embedding does not have."""
    data = read_json(path)
    model = data.get("model") if isinstance(data, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list) or not vocabulary:
        raise CheckpointError(f"{path} is no tokenizer: it has no model.vocab. Download it again.")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    if not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"{path} is damaged: model.vocab holds ids that are no integers. Download it again.")
    if max(ids) >= vocab_size:
        raise CheckpointError(
            f"{path} has ids up to {max(ids)}, the text encoder's vocab_size is {vocab_size}. "
            "Are the files of one checkpoint?"
        )
