"""Each fault that a checkpoint can have is told before any work, by name."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.tensor_file import TensorFile
from sa3_convert.components import Component
from sa3_convert.errors import CheckpointError
from tests.checkpoint.conftest import edit_json
from tests.conftest import GOLDEN

WEIGHTS = "model.safetensors"
T5GEMMA = "t5gemma-b-b-ul2/model.safetensors"
BIAS = "pretransform.model.encoder.layers.2.bias"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2270384940\n"

Tensors = dict[str, NDArray[np.generic]]


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "path", ["model_config.json", WEIGHTS, "t5gemma-b-b-ul2/config.json", T5GEMMA, "t5gemma-b-b-ul2/tokenizer.json"]
)
def test_every_file_is_needed(copy: Path, path: str) -> None:
    (copy / path).unlink()
    refused(copy, f"{Path(path).name} is missing")


@pytest.mark.parametrize(
    "path", ["model_config.json", WEIGHTS, "t5gemma-b-b-ul2/config.json", T5GEMMA, "t5gemma-b-b-ul2/tokenizer.json"]
)
def test_a_git_lfs_pointer_is_recognised(copy: Path, path: str) -> None:
    (copy / path).write_text(POINTER)
    refused(copy, f"{Path(path).name} is a git-lfs pointer.*git lfs pull")


def test_a_folder_in_place_of_a_file_is_refused(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).mkdir()
    refused(copy, "is not a file")


def test_an_absent_text_encoder_folder_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "t5gemma-b-b-ul2")
    refused(copy, "t5gemma-b-b-ul2 is missing: the text encoder belongs to the checkpoint")


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist")


def test_the_weights_file_itself_is_no_checkpoint(small_toy: Path) -> None:
    refused(small_toy / WEIGHTS, "is a file, not a folder")


@pytest.mark.parametrize("path", [WEIGHTS, T5GEMMA])
@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_told(copy: Path, path: str, keep: float) -> None:
    content = (copy / path).read_bytes()
    size = int(keep * len(content)) if isinstance(keep, float) else keep % len(content)
    (copy / path).write_bytes(content[:size])
    refused(copy, rf"{Path(path).name} \({size} bytes\) is truncated")


def test_bytes_behind_the_end_are_told(copy: Path) -> None:
    with (copy / WEIGHTS).open("ab") as stream:
        stream.write(b"\0" * 8)
    refused(copy, "truncated, damaged or no safetensors file")


@pytest.mark.parametrize("declared", [2**63, 2**64 - 1, 200_000_000, 10**6])
def test_a_header_of_impossible_length_is_told(copy: Path, declared: int) -> None:
    content = (copy / T5GEMMA).read_bytes()
    (copy / T5GEMMA).write_bytes(declared.to_bytes(8, "little") + content[8:])
    refused(copy, "truncated, damaged or no safetensors file")


@pytest.mark.parametrize("path", [WEIGHTS, T5GEMMA])
def test_a_file_of_another_kind_is_told(copy: Path, path: str) -> None:
    (copy / path).write_bytes(b"PK\x03\x04" + b"\0" * 1000)
    refused(copy, "no safetensors file")


def test_a_missing_tensor_is_named(copy: Path) -> None:
    rewrite(copy / WEIGHTS, lambda tensors: tensors.pop(BIAS))
    refused(copy, f"{BIAS} is missing")


def test_a_missing_tensor_of_the_text_encoder_is_named(copy: Path) -> None:
    rewrite(copy / T5GEMMA, lambda tensors: tensors.pop("model.encoder.norm.weight"))
    refused(copy, "model.encoder.norm.weight is missing")


def test_an_extra_tensor_is_named(copy: Path) -> None:
    rewrite(copy / WEIGHTS, lambda tensors: tensors.update({"model.model.extra": np.zeros(3, np.float32)}))
    refused(copy, "model.model.extra is not known")


def test_an_extra_tensor_of_the_text_encoder_is_named(copy: Path) -> None:
    rewrite(copy / T5GEMMA, lambda tensors: tensors.update({"model.encoder.extra": np.zeros(3, np.float32)}))
    refused(copy, "model.encoder.extra is not known")


def test_a_wrong_shape_is_named_with_the_right_one(copy: Path) -> None:
    rewrite(copy / WEIGHTS, lambda tensors: tensors.update({BIAS: np.zeros((32, 1), np.float32)}))
    refused(copy, rf"{BIAS} has shape \[32, 1\], expected \[32\]")


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int8, np.bool_])
def test_a_type_that_is_no_weight_is_named(copy: Path, dtype: type) -> None:
    rewrite(copy / WEIGHTS, lambda tensors: tensors.update({BIAS: np.zeros(32, dtype)}))
    refused(copy, f"{BIAS} is stored as .*only F32, F16, BF16 are supported")


def test_many_faults_are_counted_and_the_first_few_named(copy: Path) -> None:
    edit_json(copy / "model_config.json", lambda c: c["model"]["diffusion"]["config"].update(depth=4))
    refused(copy, "layers.2.*; and [0-9]+ more. Are the files of one checkpoint")


def test_the_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "small" / "checkpoint", tmp_path / "mixed"))
    shutil.copyfile(GOLDEN / "medium" / "checkpoint" / WEIGHTS, folder / WEIGHTS)
    refused(folder, r"does not fit its configuration.*has shape \[384, 128\], expected \[256, 128\]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_value_that_is_not_finite_is_found_with_its_place(copy: Path, value: float, dtype: type) -> None:
    name = "model.model.transformer.memory_tokens"

    def spoil(tensors: Tensors) -> None:
        tensors[name] = tensors[name].astype(dtype)
        tensors[name][3, 7] = value

    rewrite(copy / WEIGHTS, spoil)
    checkpoint = Checkpoint.open(copy)
    with pytest.raises(CheckpointError, match=rf"{name}\[3, 7\] is not a finite number"):
        checkpoint.check_values(Component.DIT)
    checkpoint.check_values(Component.DECODER)


def test_a_value_that_is_not_finite_is_found_in_bfloat16(copy: Path) -> None:
    rewrite(copy / T5GEMMA, lambda tensors: tensors["model.encoder.norm.weight"].__setitem__(5, np.nan))
    with pytest.raises(CheckpointError, match=r"norm.weight\[5\] is not a finite number"):
        Checkpoint.open(copy).check_values(Component.TEXT_ENCODER)


def test_the_last_value_of_a_tensor_of_many_pieces_is_checked(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3_convert.checkpoint.tensor_file._PIECE", 64)
    name = "model.model.transformer.layers.1.self_attn.to_out.weight"
    rewrite(copy / WEIGHTS, lambda tensors: tensors[name].__setitem__((-1, -1), np.inf))
    with pytest.raises(CheckpointError, match=r"to_out.weight\[127, 127\]"):
        Checkpoint.open(copy).check_values(Component.DIT)


def test_a_file_that_shrinks_while_it_is_read_is_told(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    with (copy / WEIGHTS).open("r+b") as stream:
        stream.truncate(200_000)
    with pytest.raises(CheckpointError, match="has become shorter"):
        checkpoint.check_values(Component.ENCODER)


TOKENIZERS = {
    "not text": (b"\xff\xfe", "is no tokenizer that can be used"),
    "a list": (b"[]", "is no tokenizer that can be used"),
    "no vocabulary": (b'{"model": {}}', "is no tokenizer that can be used"),
    "ids that are no integers": (b'{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}', "is no tokenizer"),
    "ids beyond the embedding": (
        b'{"model": {"type": "BPE", "vocab": {"a": 384}, "merges": []}}',
        "ids up to 384.*vocab_size is 384",
    ),
    "no ids": (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "ids up to -1"),
    "too many pieces": (
        json.dumps({"model": {"type": "Unigram", "unk_id": 0, "vocab": [[f"a{i}", 0] for i in range(400)]}}).encode(),
        "ids up to 399",
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_refused(copy: Path, case: str) -> None:
    content, message = TOKENIZERS[case]
    (copy / "t5gemma-b-b-ul2" / "tokenizer.json").write_bytes(content)
    refused(copy, message)


HEADERS = {
    "a name twice": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    '"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}',
    "one tensor over another": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    '"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "a gap": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "another size": '{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
    "an unknown type": '{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}',
    "a huge number": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,' + "8" * 400 + "]}}",
    "a huge shape": '{"a":{"dtype":"F32","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,8]}}',
    "a fraction": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8.0]}}',
    "a deep shape": '{"a":{"dtype":"F32","shape":' + "[" * 100_000 + "]" * 100_000 + ',"data_offsets":[0,8]}}',
    "deep metadata": '{"__metadata__":{"x":' + '{"x":' * 100_000 + "1" + "}" * 100_000 + "}}",
    "a list": "[]",
    "a longer header than any": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' + " " * (17 << 20),
    "NUL in a name": '{"a\\u0000":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_cannot_be_is_told(tmp_path: Path, case: str) -> None:
    header = HEADERS[case].encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match="truncated, damaged or no safetensors file"):
        TensorFile(path)


GOOD = (GOLDEN / "small" / "checkpoint" / T5GEMMA).read_bytes()
HEADER = 8 + int.from_bytes(GOOD[:8], "little")

fuzz = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(position=st.integers(0, HEADER - 1), value=st.integers(0, 255))
def test_any_changed_byte_of_a_header_is_refused_or_read(tmp_path: Path, position: int, value: int) -> None:
    damaged = bytearray(GOOD)
    damaged[position] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(damaged)
    with contextlib.suppress(CheckpointError):
        assert sum(entry.nbytes for entry in TensorFile(path).entries.values()) <= len(GOOD)


@fuzz
@given(length=st.integers(0, len(GOOD) - 1))
def test_any_truncation_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD[:length])
    with pytest.raises(CheckpointError):
        TensorFile(path)


@fuzz
@given(content=st.binary(max_size=200))
@example(content=b"\xff" * 8)
@example(content=(2).to_bytes(8, "little") + b"{}")
def test_any_bytes_are_refused_or_hold_what_they_say(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert TensorFile(path).entries == {}


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "F8_E4M3", "X"]),
        "shape": st.lists(st.integers(-1, 2**65) | st.integers(0, 4), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 2**65) | st.integers(0, 64), min_size=1, max_size=3),
    }
)


@fuzz
@given(entries=st.dictionaries(st.text(max_size=3), ENTRY, max_size=3), size=st.integers(0, 64))
@example(entries={"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, size=16)
@example(entries={"a": {"dtype": "F32", "shape": [2**63, 4], "data_offsets": [0, 16]}}, size=16)
def test_any_header_is_refused_or_its_tensors_lie_in_the_file(tmp_path: Path, entries: object, size: int) -> None:
    header = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * size)
    with contextlib.suppress(CheckpointError):
        file = TensorFile(path)
        for name, entry in file.entries.items():
            assert 8 + len(header) <= entry.offset <= entry.offset + entry.nbytes <= path.stat().st_size
            file.require_finite(name)
