from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import safetensors_header, synthesize
from sa3_convert.checkpoint.tensors import expected_tensors
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.networks.build import build_network
from tests.conftest import GOLDEN, Golden

T5GEMMA = "t5gemma-b-b-ul2/model.safetensors"


def test_golden_checkpoints_open_and_are_finite(golden: Golden) -> None:
    checkpoint = Checkpoint.open(golden.checkpoint)
    for component in Component:
        checkpoint.check_values(component)
    assert checkpoint.folder == golden.checkpoint


def test_states_fit_the_networks(golden: Golden) -> None:
    checkpoint = Checkpoint.open(golden.checkpoint)
    for component in Component:
        state = checkpoint.state(component)
        assert build_network(component, checkpoint.layout, state).state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    ("component", "name", "source"),
    [
        (Component.DIT, "transformer.project_in.weight", "model.model.transformer.project_in.weight"),
        (Component.DECODER, "bottleneck.running_std", "pretransform.model.bottleneck.running_std"),
        (Component.DECODER, "decoder.layers.1.weight", "pretransform.model.decoder.layers.1.weight"),
        (Component.ENCODER, "layers.0.new_tokens", "pretransform.model.encoder.layers.0.new_tokens"),
        (
            Component.NUMBER_CONDITIONER,
            "embedder.embedding.1.bias",
            "conditioner.conditioners.seconds_total.embedder.embedding.1.bias",
        ),
        (Component.TEXT_ENCODER, "padding_embedding", "conditioner.conditioners.prompt.padding_embedding"),
    ],
)
def test_states_carry_the_files_values_by_the_networks_names(component: Component, name: str, source: str) -> None:
    folder = GOLDEN / "small" / "checkpoint"
    state = Checkpoint.open(folder).state(component)
    np.testing.assert_array_equal(state[name].numpy(), load_file(folder / "model.safetensors")[source], strict=True)


def test_bfloat16_is_widened_exactly() -> None:
    folder = GOLDEN / "small" / "checkpoint"
    weight = Checkpoint.open(folder).state(Component.TEXT_ENCODER)["layers.0.mlp.up_proj.weight"]
    stored = load_file(folder / T5GEMMA)["model.encoder.layers.0.mlp.up_proj.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weight.numpy(), stored.astype(np.float32), strict=True)


def test_the_text_encoders_decoder_is_not_loaded() -> None:
    state = Checkpoint.open(GOLDEN / "small" / "checkpoint").state(Component.TEXT_ENCODER)
    assert not [name for name in state if "decoder" in name]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_in_half_precision_are_widened(copy: Path, dtype: type) -> None:
    path = copy / "model.safetensors"
    narrow = {name: tensor.astype(dtype) for name, tensor in load_file(path).items()}
    save_file(narrow, path)
    state = Checkpoint.open(copy).state(Component.ENCODER)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    expected = narrow["pretransform.model.encoder.layers.2.bias"].astype(np.float32)
    np.testing.assert_array_equal(state["layers.2.bias"].numpy(), expected, strict=True)


def test_float32_tensors_are_views_of_the_file_that_writing_does_not_reach(small_toy: Path) -> None:
    before = (small_toy / "model.safetensors").read_bytes()
    state = Checkpoint.open(small_toy).state(Component.NUMBER_CONDITIONER)
    state["embedder.embedding.1.bias"].zero_()
    assert (small_toy / "model.safetensors").read_bytes() == before


def test_a_text_encoder_file_without_its_decoder_is_taken(copy: Path) -> None:
    whole = Checkpoint.open(copy).digest(Component.TEXT_ENCODER)
    tensors = load_file(copy / T5GEMMA)
    save_file({name: t for name, t in tensors.items() if name.startswith("model.encoder.")}, copy / T5GEMMA)
    assert Checkpoint.open(copy).digest(Component.TEXT_ENCODER) == whole


def test_digests_differ_between_components_and_stay(small_toy: Path) -> None:
    checkpoint = Checkpoint.open(small_toy)
    digests = [checkpoint.digest(component) for component in Component]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 for digest in digests)
    assert [Checkpoint.open(small_toy).digest(component) for component in Component] == digests


@pytest.mark.parametrize(
    ("name", "touched"),
    [
        ("model.model.transformer.memory_tokens", Component.DIT),
        ("conditioner.conditioners.prompt.padding_embedding", Component.TEXT_ENCODER),
        ("pretransform.model.bottleneck.bias", Component.DECODER),
        ("pretransform.model.encoder.layers.2.bias", Component.ENCODER),
    ],
)
def test_one_changed_bit_changes_the_digest_of_its_component_alone(copy: Path, name: str, touched: Component) -> None:
    before = {component: Checkpoint.open(copy).digest(component) for component in Component}
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(np.uint8).flat[0] ^= 1
    save_file(tensors, copy / "model.safetensors")
    after = {component: Checkpoint.open(copy).digest(component) for component in Component}
    assert {component for component in Component if before[component] != after[component]} == {touched}


def test_a_digest_does_not_depend_on_the_order_in_the_file(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    before = checkpoint.digest(Component.DIT)
    backwards = dict(reversed(expected_tensors(checkpoint.layout).items()))
    tensors = load_file(copy / "model.safetensors")
    content = b"".join(tensors[name].tobytes() for name in backwards)
    (copy / "model.safetensors").write_bytes(safetensors_header(backwards) + content)
    reopened = Checkpoint.open(copy)
    assert next(iter(reopened.weights.entries)) == next(iter(backwards))
    assert reopened.digest(Component.DIT) == before


def test_sizes_are_known_without_reading_values(small_toy: Path) -> None:
    checkpoint = Checkpoint.open(small_toy)
    stored = checkpoint.stored(Component.TEXT_ENCODER)
    assert stored.keys() == checkpoint.state(Component.TEXT_ENCODER).keys()
    assert stored["embed_tokens.weight"].nbytes == 384 * 64 * 2
    assert stored["padding_embedding"].nbytes == 64 * 4


def test_an_autoencoder_alone_has_no_dit(tmp_path: Path) -> None:
    synthesize(tmp_path / "same-l", "same-l")
    checkpoint = Checkpoint.open(tmp_path / "same-l")
    assert "decoder.layers.1.weight" in checkpoint.state(Component.DECODER)
    assert "layers.2.weight" in checkpoint.state(Component.ENCODER)
    with pytest.raises(UsageError, match="autoencoder alone"):
        checkpoint.state(Component.DIT)
