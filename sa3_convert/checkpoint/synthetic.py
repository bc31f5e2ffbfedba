"""Checkpoints in the published format with seeded random weights.

They let everything be built, tested and measured without the published weights: same files, names, shapes and byte
sizes, with statistics that are fixed so that figures compare. Nothing is ever held whole: a file's header is written
first, then tensor after tensor in pieces of 16 MB.

With one seed, variants of a family share their autoencoder and all share their T5Gemma file, as the published ones do;
the learned padding embedding is each variant's own, there too.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from sa3_convert.checkpoint.layout import TEXT_ENCODER_FOLDER, read_layout
from sa3_convert.checkpoint.published import model_config, text_encoder_config
from sa3_convert.checkpoint.random_weights import Weights, generator_for, pieces
from sa3_convert.checkpoint.tensors import (
    AUTOENCODER_PREFIX,
    TEXT_DECODER_PREFIX,
    TEXT_ENCODER_PREFIX,
    TensorSpec,
    expected_tensors,
    expected_text_encoder_tensors,
)
from sa3_convert.checkpoint.toy_tokenizer import toy_tokenizer
from sa3_convert.checkpoint.variants import Size, Variant, variant_named
from sa3_convert.errors import UsageError
from sa3_convert.files import atomic_folder

Progress = Callable[[int, int], None]
"""Called with the bytes written and the bytes in all."""

_HEADER_ALIGNMENT = 8
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "padding_side": "right",
    "add_bos_token": False,
    "add_eos_token": False,
    "model_max_length": 1048576,
}


def synthesize(
    folder: Path,
    variant: str,
    size: Size = "toy",
    seed: int = 0,
    weights: Weights = "gaussian",
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint of `variant` into `folder`, which takes its name only when it is complete.

    Args:
        folder: must not exist or be empty.
        variant: a name of `variants.VARIANTS`.
        size: `full` has the published shapes, `toy` a few MB.
        seed: the same seed gives the same bytes.
        weights: `gaussian`, or `heavy-tailed` (see `random_weights`).
        progress: told about bytes written.

    Raises:
        UsageError: the variant is not known, the folder is not empty, or the disk is too small.

    """
    chosen = variant_named(variant)
    with atomic_folder(folder) as partial:
        _write_json(partial / "model_config.json", model_config(chosen, size))
        if not chosen.is_autoencoder:
            _write_text_encoder_data(partial / TEXT_ENCODER_FOLDER, chosen, size)
        layout = read_layout(partial)
        files = {partial / "model.safetensors": expected_tensors(layout)}
        if layout.text_encoder is not None:
            tensors = expected_text_encoder_tensors(layout.text_encoder, decoder=True)
            files[partial / TEXT_ENCODER_FOLDER / "model.safetensors"] = tensors
        total = sum(spec.nbytes for tensors in files.values() for spec in tensors.values())
        _check_space(partial, total)
        done = 0
        for path, tensors in files.items():
            for written in _write_tensors(path, tensors, chosen, seed, weights):
                done += written
                if progress is not None:
                    progress(done, total)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"The checkpoint needs {needed / 2**30:.1f} GiB, {folder.parent} has {free / 2**30:.1f} GiB left. "
            "Make room or give a folder on another disk."
        )


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _write_text_encoder_data(folder: Path, variant: Variant, size: Size) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", text_encoder_config(variant, size))
    _write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
    (folder / "tokenizer.json").write_text(toy_tokenizer(), encoding="utf-8")


def safetensors_header(tensors: Mapping[str, TensorSpec]) -> bytes:
    """Return the first bytes of a safetensors file: length, JSON, padded so that the data is aligned.

    As published, the text encoder's file (the bfloat16 one) says what wrote it and the other says nothing, so both have
    exactly the published byte sizes.
    """
    entries: dict[str, object] = {}
    if any(spec.stored == "BF16" for spec in tensors.values()):
        entries["__metadata__"] = {"format": "pt"}
    offset = 0
    for name, spec in tensors.items():
        entries[name] = {
            "dtype": spec.stored,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensors(
    path: Path, tensors: Mapping[str, TensorSpec], variant: Variant, seed: int, weights: Weights
) -> Iterator[int]:
    """Write a whole file, yielding the number of bytes after each piece."""
    with path.open("wb") as stream:
        stream.write(safetensors_header(tensors))
        for name, spec in tensors.items():
            yield from _write_tensor(stream, spec, weights, generator_for(seed, *_identity(name, variant)))


def _identity(name: str, variant: Variant) -> tuple[str, str]:
    """Return what a tensor's values depend on besides the seed: its owner, and its name there."""
    if name.startswith((TEXT_ENCODER_PREFIX, TEXT_DECODER_PREFIX)):
        return "t5gemma", name
    if name.startswith(AUTOENCODER_PREFIX) or variant.is_autoencoder:
        return f"same-{variant.family}", name.removeprefix(AUTOENCODER_PREFIX)
    return variant.name, name


def _write_tensor(
    stream: BinaryIO, spec: TensorSpec, weights: Weights, generator: np.random.Generator
) -> Iterator[int]:
    for piece in pieces(spec, weights, generator):
        stored = piece if spec.stored == "F32" else piece.astype(ml_dtypes.bfloat16).view(np.uint16)
        stream.write(stored.data)
        yield stored.nbytes
