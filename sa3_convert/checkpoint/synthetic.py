"""Checkpoints in the published format with seeded random weights, and a small tokenizer for those of toy size."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sa3_convert.checkpoint.config import TEXT_ENCODER_FOLDER, read_layout
from sa3_convert.checkpoint.published import model_config, text_encoder_config
from sa3_convert.checkpoint.reader import SOURCE
from sa3_convert.checkpoint.tensors import (
    AUTOENCODER_PREFIX,
    TEXT_DECODER_PREFIX,
    TEXT_ENCODER_PREFIX,
    Constant,
    Embedding,
    Matrix,
    Normal,
    RotaryFrequencies,
    Shape,
    TensorSpec,
    Uniform,
    expected_tensors,
    expected_text_encoder_tensors,
)
from sa3_convert.checkpoint.variants import Size, Variant, variant_named
from sa3_convert.system.files import atomic_folder, require_space

Weights = Literal["gaussian", "heavy-tailed"]
Piece = NDArray[np.float32]

PIECE_ELEMENTS = 1 << 22
_FREEDOM = 5.0
_OUTLIER_SHARE = 128
_INPUT_OUTLIERS = (3.0, 6.0)
_OUTPUT_OUTLIERS = (2.0, 4.0)


def generator_for(*keys: str | int) -> np.random.Generator:
    """Return a generator that depends on the keys alone."""
    digest = hashlib.sha256("\0".join(str(key) for key in keys).encode()).digest()
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(int.from_bytes(digest, "little"))))


def pieces(spec: TensorSpec, weights: Weights, generator: np.random.Generator) -> Iterator[Piece]:
    """Yield a tensor's values in order, flat, in pieces of about `PIECE_ELEMENTS` float32."""
    match spec.distribution:
        case Constant(value):
            yield np.full(spec.elements, value, np.float32)
        case RotaryFrequencies(base):
            exponents = np.arange(spec.elements, dtype=np.float64) / spec.elements
            yield (base**-exponents).astype(np.float32)
        case Uniform(low, high):
            yield generator.uniform(low, high, spec.elements).astype(np.float32)
        case Normal(deviation, mean):
            yield from _gaussian(spec.shape, deviation, mean, generator)
        case Matrix(fan_in):
            deviation = fan_in**-0.5
            if weights == "gaussian":
                yield from _gaussian(spec.shape, deviation, 0.0, generator)
            else:
                yield from _heavy_tailed(spec.shape, deviation, generator, outlier_rows=True)
        case Embedding(deviation):
            if weights == "gaussian":
                yield from _gaussian(spec.shape, deviation, 0.0, generator)
            else:
                yield from _heavy_tailed(spec.shape, deviation, generator, outlier_rows=False)


def _gaussian(shape: Shape, deviation: float, mean: float, generator: np.random.Generator) -> Iterator[Piece]:
    left = math.prod(shape)
    while left:
        piece = generator.standard_normal(min(left, PIECE_ELEMENTS), dtype=np.float32)
        piece *= np.float32(deviation)
        piece += np.float32(mean)
        yield piece
        left -= piece.size


def _heavy_tailed(
    shape: Shape, deviation: float, generator: np.random.Generator, *, outlier_rows: bool
) -> Iterator[Piece]:
    rows, columns, kernel = shape[0], shape[1], math.prod(shape[2:])
    row_scale = _channel_scales(rows, _OUTPUT_OUTLIERS, generator) if outlier_rows else np.ones(rows, np.float32)
    column_scale = np.repeat(_channel_scales(columns, _INPUT_OUTLIERS, generator), kernel)
    # Student's t is a normal over the root of a gamma; its variance f/(f-2) is divided out in the same step.
    unit = np.float32((_FREEDOM - 2) / 2)
    step = max(1, PIECE_ELEMENTS // (columns * kernel))
    for start in range(0, rows, step):
        block = (min(step, rows - start), columns * kernel)
        piece = generator.standard_gamma(_FREEDOM / 2, block, dtype=np.float32)
        np.divide(unit, piece, out=piece)
        np.sqrt(piece, out=piece)
        piece *= generator.standard_normal(block, dtype=np.float32)
        piece *= column_scale
        piece *= row_scale[start : start + step, None] * np.float32(deviation)
        yield piece.reshape(-1)


def _channel_scales(channels: int, outliers: tuple[float, float], generator: np.random.Generator) -> Piece:
    """Return one factor per channel, a few of them large, with a mean square of exactly 1."""
    scales = np.ones(channels)
    chosen = generator.choice(channels, max(1, channels // _OUTLIER_SHARE), replace=False)
    scales[chosen] = generator.uniform(*outliers, chosen.size)
    scales /= np.sqrt(np.mean(scales**2))
    return scales.astype(np.float32)


VOCABULARY = 384
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
_SPACE = "▁"
_ALPHABET = "".join(chr(code) for code in range(33, 127)) + _SPACE
_PROMPTS = (
    "a slow ambient pad with soft strings and distant bells, 70 bpm",
    "fast drum and bass with a deep sub bass, chopped breaks, 174 bpm",
    "lo-fi hip hop beat, dusty drums, electric piano, vinyl noise, 84 bpm",
    "warm analog synthesizer arpeggio, driving techno kick, 128 bpm",
    "solo acoustic guitar, gentle fingerpicking, major key, live recording",
    "orchestral trailer music with brass, timpani and a rising choir",
    "funky disco groove, slap bass, rhythm guitar, claps, 118 bpm",
    "jazz trio in a small club, upright bass, brushed snare, piano solo",
    "thunder and heavy rain on a metal roof, wind in the trees",
    "footsteps on gravel, a door creaks open, a dog barks far away",
    "glass breaking, explosion with debris, sci-fi laser shots",
    "crowd cheering in a stadium, whistle, applause, announcer",
    "high quality stereo music, instrumental, loop, clean mix",
    "melody, harmony, tempo, energetic, dark, bright, calm, happy, sad",
)


def toy_tokenizer() -> str:
    """Return the contents of `tokenizer.json`; the same bytes every time."""
    return trained_tokenizer(_PROMPTS, VOCABULARY, longest=8)


def trained_tokenizer(prompts: Sequence[str], vocabulary: int, *, longest: int, words: bool = False) -> str:
    """Return the contents of a `tokenizer.json` whose tokens are learned from prompts; the same bytes every time.

    Args:
        prompts: what it learns from.
        vocabulary: the most tokens.
        longest: of a token, in characters.
        words: whether no token goes beyond a word.

    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(_SPACE, "merged_with_next")
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Replace(_SPACE, " ")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=list(_ALPHABET),
        max_token_length=longest,
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    # No token that was learned in words goes beyond one, so encoding needs no cutting into words.
    tokenizer.pre_tokenizer = None
    return tokenizer.to_str(pretty=True)


Progress = Callable[[int, int], None]
"""Called with the bytes written and the bytes in all."""

_HEADER_ALIGNMENT = 8
TOKENIZER_CONFIG = {
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
        _write_json(partial / SOURCE, {"synthetic": True})
        if not chosen.is_autoencoder:
            _write_text_encoder_data(partial / TEXT_ENCODER_FOLDER, chosen, size)
        layout = read_layout(partial)
        files = {partial / "model.safetensors": expected_tensors(layout)}
        if layout.text_encoder is not None:
            tensors = expected_text_encoder_tensors(layout.text_encoder, decoder=True)
            files[partial / TEXT_ENCODER_FOLDER / "model.safetensors"] = tensors
        total = sum(spec.nbytes for tensors in files.values() for spec in tensors.values())
        require_space(partial, total, "The checkpoint")
        done = 0
        for path, tensors in files.items():
            for written in _write_tensors(path, tensors, chosen, seed, weights):
                done += written
                if progress is not None:
                    progress(done, total)


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _write_text_encoder_data(folder: Path, variant: Variant, size: Size) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", text_encoder_config(variant, size))
    _write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
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
