"""What training leaves in a file of weights is left aside; what would be another model is refused by name."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.checkpoint.tensors import is_leftover
from sa3_convert.components import Component
from sa3_convert.errors import CheckpointError

WEIGHTS = "model.safetensors"
T5GEMMA = "t5gemma-b-b-ul2/model.safetensors"
TABLE = "model.model.transformer.memory_tokens"

Tensors = dict[str, NDArray[Any]]


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(path)), path)


def digests(folder: Path) -> list[str]:
    checkpoint = Checkpoint.open(folder)
    return [checkpoint.digest(component) for component in Component]


def averages(tensors: Tensors) -> Tensors:
    """Return what ema_pytorch keeps of the diffusion model beside it: copies, and two counters."""
    copies = {
        f"diffusion_ema.ema_model.{name.removeprefix('model.')}": tensor * 0.5
        for name, tensor in tensors.items()
        if name.startswith("model.model.")
    }
    counters: Tensors = {"diffusion_ema.initted": np.array([True]), "diffusion_ema.step": np.array([7])}
    return tensors | copies | counters


def test_averages_are_left_aside_and_the_plain_names_are_used(small_toy: Path, copy: Path) -> None:
    rewrite(copy / WEIGHTS, averages)
    assert digests(copy) == digests(small_toy)
    state = Checkpoint.open(copy).state(Component.DIT)
    np.testing.assert_array_equal(state["transformer.memory_tokens"].numpy(), load_file(small_toy / WEIGHTS)[TABLE])


@pytest.mark.parametrize(
    "name",
    [
        "model_ema.decay",
        "ema.model.model.transformer.memory_tokens",
        "autoencoder_ema.ema_model.decoder.layers.1.weight",
        "model.model_ema.transformer.memory_tokens",
        "discriminator.discriminators.0.convs.0.weight",
        "teacher_model.model.model.transformer.memory_tokens",
        "losses_gen.losses.0.weight",
        "optimizer_states.0.exp_avg",
    ],
)
def test_what_only_training_reads_is_left_aside(small_toy: Path, copy: Path, name: str) -> None:
    rewrite(copy / WEIGHTS, lambda tensors: tensors | {name: np.ones(3, np.float32)})
    assert digests(copy) == digests(small_toy)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.int8, np.bool_])
@pytest.mark.parametrize(
    ("path", "name"),
    [
        (WEIGHTS, "model.model.transformer.layers.0.norm.num_batches_tracked"),
        (WEIGHTS, "pretransform.model.decoder.position_ids"),
        (WEIGHTS, "step"),
        (T5GEMMA, "model.encoder.embeddings.position_ids"),
    ],
)
def test_buffers_that_count_are_left_aside(small_toy: Path, copy: Path, path: str, name: str, dtype: type) -> None:
    rewrite(copy / path, lambda tensors: tensors | {name: np.ones((1, 4), dtype)})
    assert digests(copy) == digests(small_toy)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (["model.model.transformer.layers.0.extra.weight"], "layers.0.extra.weight is not known.*strip it"),
        (["conditioner.conditioners.prompt.model.norm.weight"], "prompt.model.norm.weight is not known.*strip it"),
        (["lyrics.a", "lyrics.b", "lyrics.c"], r"lyrics… \(3 tensors\) is not known.*strip it from the file"),
        (["model.model.schema"], "model.model.schema is not known"),
        (["model.model.cinema.weight"], "model.model.cinema.weight is not known"),
    ],
)
def test_what_may_be_part_of_another_model_is_named(copy: Path, added: list[str], message: str) -> None:
    rewrite(copy / WEIGHTS, lambda tensors: tensors | {name: np.ones(3, np.float32) for name in added})
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(copy)


def test_the_checkpoint_of_a_training_is_recognised_with_what_to_do(copy: Path) -> None:
    rewrite(copy / WEIGHTS, lambda t: {f"diffusion.{n}": v for n, v in t.items() if not n.startswith("diffusion_ema")})
    with pytest.raises(CheckpointError, match=r"(\d+) of the \1 tensors stand there with 'diffusion.' before.*unwrap"):
        Checkpoint.open(copy)


def test_the_weights_of_a_whole_checkpoint_are_told_from_those_of_an_autoencoder_alone(
    small_toy: Path, tmp_path: Path
) -> None:
    synthesize(tmp_path / "same-s", "same-s")
    shutil.copyfile(small_toy / WEIGHTS, tmp_path / "same-s" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"(\d+) of the \1 tensors stand there with 'pretransform.model.' before"):
        Checkpoint.open(tmp_path / "same-s")


def test_quantised_weights_are_no_buffers(copy: Path) -> None:
    name = "model.model.transformer.project_in.weight"
    rewrite(copy / WEIGHTS, lambda tensors: tensors | {name: tensors[name].astype(np.int8)})
    with pytest.raises(CheckpointError, match=f"{name} is stored as I8; only F32, F16, BF16"):
        Checkpoint.open(copy)


def test_no_tensor_that_a_layout_has_is_taken_for_a_leftover(small_toy: Path) -> None:
    checkpoint = Checkpoint.open(small_toy)
    assert checkpoint.text_encoder is not None
    for file in (checkpoint.weights, checkpoint.text_encoder):
        assert not [name for name, entry in file.entries.items() if is_leftover(name, entry.stored)]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened_in_the_scratch_folder_and_leaves_nothing(
    copy: Path, tmp_path: Path, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sa3_convert.checkpoint.tensor_file._WRITTEN_AT_ONCE", 1000)
    rewrite(copy / WEIGHTS, lambda tensors: {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for component in Component:
        in_memory = Checkpoint.open(copy).state(component)
        mapped = Checkpoint.open(copy).state(component, scratch=scratch)
        for name, tensor in mapped.items():
            np.testing.assert_array_equal(tensor.numpy(), in_memory[name].numpy(), strict=True)
    assert list(scratch.iterdir()) == []
    stored = load_file(copy / WEIGHTS)
    np.testing.assert_array_equal(
        Checkpoint.open(copy).state(Component.DIT, scratch=scratch)["transformer.memory_tokens"].numpy(),
        stored[TABLE].astype(np.float32),
        strict=True,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is mapped")
def test_what_is_widened_is_mapped_and_not_held_in_memory(copy: Path, tmp_path: Path) -> None:
    table = Checkpoint.open(copy).state(Component.TEXT_ENCODER, scratch=tmp_path)["embed_tokens.weight"]
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, end = (int(address, 16) for address in line.split()[0].split("-"))
        if first <= table.data_ptr() < end:
            assert str(tmp_path) in line
            return
    pytest.fail("the tensor lies in no mapping")
