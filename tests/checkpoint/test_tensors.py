import json
from pathlib import Path

import pytest

from sa3_convert.checkpoint.config import read_layout
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.published import model_config, text_encoder_config
from sa3_convert.checkpoint.synthetic import safetensors_header
from sa3_convert.checkpoint.tensor_file import TensorFile
from sa3_convert.checkpoint.tensors import Matrix, expected_tensors, expected_text_encoder_tensors
from sa3_convert.checkpoint.variants import VARIANTS
from tests.conftest import GOLDEN

# Names, counts and file sizes of the checkpoints on the hub.
PUBLISHED = {
    "small-music": (685, 2_270_384_940),
    "small-sfx": (685, 2_270_384_940),
    "small-music-base": (685, 2_270_384_940),
    "small-sfx-base": (685, 2_270_384_940),
    "medium": (997, 9_222_116_660),
    "medium-base": (997, 9_222_116_660),
    "same-s": (244, 433_007_588),
    "same-l": (472, 3_408_566_892),
}


def full_layout(name: str, folder: Path) -> CheckpointLayout:
    variant = VARIANTS[name]
    (folder / "model_config.json").write_text(json.dumps(model_config(variant, "full")))
    if not variant.is_autoencoder:
        (folder / "t5gemma-b-b-ul2").mkdir()
        (folder / "t5gemma-b-b-ul2" / "config.json").write_text(json.dumps(text_encoder_config(variant, "full")))
    return read_layout(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_true_size_has_the_published_tensor_count_and_file_size(name: str, tmp_path: Path) -> None:
    tensors = expected_tensors(full_layout(name, tmp_path))
    size = len(safetensors_header(tensors)) + sum(spec.nbytes for spec in tensors.values())
    assert (len(tensors), size) == PUBLISHED[name]


def test_every_published_variant_is_counted() -> None:
    assert PUBLISHED.keys() == VARIANTS.keys()


@pytest.mark.parametrize(("name", "parameters"), [("small-music", 459_130_880), ("medium", 1_453_170_192)])
def test_true_size_dit_has_the_published_parameters(name: str, parameters: int, tmp_path: Path) -> None:
    tensors = expected_tensors(full_layout(name, tmp_path))
    dit = {key: spec.elements for key, spec in tensors.items() if key.startswith("model.model.")}
    buffer = dit.pop("model.model.transformer.rotary_pos_emb.inv_freq")
    # The published figure of medium counts its table of 16 frequencies, that of small does not.
    assert sum(dit.values()) + (buffer if name == "medium" else 0) == parameters


def test_true_size_same_l_has_the_published_parameters(tmp_path: Path) -> None:
    assert sum(spec.elements for spec in expected_tensors(full_layout("same-l", tmp_path)).values()) == 852_127_457


def test_true_size_text_encoder_file_has_the_published_tensor_count_and_size(tmp_path: Path) -> None:
    text_encoder = full_layout("small-music", tmp_path).text_encoder
    assert text_encoder is not None
    tensors = expected_text_encoder_tensors(text_encoder, decoder=True)
    size = len(safetensors_header(tensors)) + sum(spec.nbytes for spec in tensors.values())
    assert (len(tensors), size) == (340, 1_183_022_944)


@pytest.mark.parametrize("family", ["small", "medium"])
def test_golden_checkpoints_hold_exactly_the_expected_tensors(family: str) -> None:
    folder = GOLDEN / family / "checkpoint"
    layout = read_layout(folder)
    assert layout.text_encoder is not None
    files = {
        "model.safetensors": expected_tensors(layout),
        "t5gemma-b-b-ul2/model.safetensors": expected_text_encoder_tensors(layout.text_encoder, decoder=True),
    }
    for path, expected in files.items():
        entries = TensorFile(folder / path).entries
        found = {name: (entry.shape, entry.stored) for name, entry in entries.items()}
        assert found == {name: (spec.shape, spec.stored) for name, spec in expected.items()}


def test_the_text_encoders_decoder_is_optional(tmp_path: Path) -> None:
    text_encoder = full_layout("small-music", tmp_path).text_encoder
    assert text_encoder is not None
    assert all(name.startswith("model.encoder.") for name in expected_text_encoder_tensors(text_encoder))


def test_an_autoencoder_alone_has_the_names_without_prefix(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "alone").mkdir()
    whole = expected_tensors(full_layout("small-music", tmp_path / "whole"))
    alone = expected_tensors(full_layout("same-s", tmp_path / "alone"))
    prefix = "pretransform.model."
    assert alone == {key.removeprefix(prefix): spec for key, spec in whole.items() if key.startswith(prefix)}


def test_fan_in_of_a_convolution_counts_its_kernel(tmp_path: Path) -> None:
    tensors = expected_tensors(full_layout("small-music", tmp_path))
    mapping = tensors["pretransform.model.decoder.layers.3.mapping.weight_v"]
    assert mapping.shape == (512, 768, 3)
    assert mapping.distribution == Matrix(768 * 3)
