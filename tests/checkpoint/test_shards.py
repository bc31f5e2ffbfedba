"""Weights in shards are the same weights; an index is believed only where the files beside it agree."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sa3_convert.checkpoint.lora_file import LoraRequest
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.tensor_file import shard_names
from sa3_convert.components import Component
from sa3_convert.errors import CheckpointError
from tests.checkpoint.adapters import toy_adapter
from tests.checkpoint.sharding import INDEX, WEIGHTS, read_index, shard, write_index

BIAS = "pretransform.model.encoder.layers.2.bias"
TEXT = "t5gemma-b-b-ul2"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("count", [1, 3, 50])
def test_shards_hold_the_same_checkpoint(small_toy: Path, copy: Path, count: int) -> None:
    whole = Checkpoint.open(small_toy)
    shard(copy, count)
    shard(copy / TEXT, count)
    parts = Checkpoint.open(copy)
    for component in Component:
        assert parts.digest(component) == whole.digest(component)
        assert parts.stored(component).keys() == whole.stored(component).keys()
        expected, state = whole.state(component), parts.state(component)
        for name, tensor in state.items():
            np.testing.assert_array_equal(tensor.numpy(), expected[name].numpy(), strict=True)
        parts.check_values(component)


def test_an_adapter_is_merged_into_shards(small_toy: Path, copy: Path, tmp_path: Path) -> None:
    loras = [LoraRequest(toy_adapter(tmp_path / "a.safetensors", small_toy))]
    expected = Checkpoint.open(small_toy).with_loras(loras)
    shard(copy)
    sharded = Checkpoint.open(copy).with_loras(loras)
    assert sharded.digest(Component.DIT) == expected.digest(Component.DIT)
    for name, tensor in sharded.state(Component.DIT).items():
        np.testing.assert_array_equal(tensor.numpy(), expected.state(Component.DIT)[name].numpy(), strict=True)


def test_shards_that_are_links_are_read_as_the_hubs_cache_has_them(small_toy: Path, copy: Path, tmp_path: Path) -> None:
    for name in shard(copy):
        shutil.move(copy / name, tmp_path / f"blob-{name}")
        (copy / name).symlink_to(tmp_path / f"blob-{name}")
    assert Checkpoint.open(copy).digest(Component.DIT) == Checkpoint.open(small_toy).digest(Component.DIT)


def test_the_whole_file_is_taken_where_both_stand(copy: Path) -> None:
    shutil.copyfile(copy / WEIGHTS, copy / "kept")
    shard(copy)
    (copy / "kept").rename(copy / WEIGHTS)
    (copy / INDEX).write_text("nonsense")
    assert Checkpoint.open(copy).weights.path.name == WEIGHTS


def test_the_files_that_an_index_needs_are_told_once_each(copy: Path) -> None:
    assert shard_names(copy / INDEX if shard(copy, 4) else copy) == tuple(
        f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)
    )


def test_a_missing_shard_is_named(copy: Path) -> None:
    names = shard(copy)
    (copy / names[1]).unlink()
    refused(copy, f"names {names[1]}, missing beside it")


def test_a_missing_index_is_named(copy: Path) -> None:
    shard(copy)
    (copy / INDEX).unlink()
    refused(copy, f"index {INDEX} is missing")


def test_a_pointer_in_place_of_a_shard_is_recognised(copy: Path) -> None:
    (copy / shard(copy)[2]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(copy, "00003-of-00003.safetensors is a git-lfs pointer")


def test_a_truncated_shard_is_named(copy: Path) -> None:
    path = copy / shard(copy)[0]
    path.write_bytes(path.read_bytes()[:-4])
    refused(copy, "00001-of-00003.safetensors .* is truncated")


def test_a_value_that_is_not_finite_is_found_in_its_shard(copy: Path) -> None:
    for path in (copy / name for name in shard(copy)):
        tensors = load_file(path)
        if BIAS in tensors:
            tensors[BIAS][3] = np.nan
            save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"model-0.*{BIAS}\[3\] is not a finite number"):
        Checkpoint.open(copy).check_values(Component.ENCODER)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        ".safetensors",
        "..safetensors",
        "model.bin",
        "model.safetensors\n",
        "",
        None,
        7,
        ["model.safetensors"],
        "a" * 300 + ".safetensors",
    ],
)
def test_a_name_that_is_no_file_of_weights_beside_the_index_is_refused(copy: Path, name: object) -> None:
    shard(copy)
    data = read_index(copy)
    data["weight_map"][BIAS] = name
    write_index(copy, data)
    refused(copy, "names .* as a file of weights")


def moved(data: dict[str, Any]) -> None:
    placed = data["weight_map"]
    placed[BIAS] = next(name for name in set(placed.values()) if name != placed[BIAS])


def invented(data: dict[str, Any]) -> None:
    data["weight_map"]["model.model.new"] = data["weight_map"][BIAS]


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "in another file": (moved, f"'{BIAS}' stands in .*, the index says 'model-"),
    "in no file": (invented, "'model.model.new' is not in model-"),
    "not in the index": (lambda data: data["weight_map"].pop(BIAS), f"'{BIAS}' stands in .*, the index says None"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_an_index_that_says_other_than_the_files_is_refused(copy: Path, case: str) -> None:
    change, message = CONTRADICTIONS[case]
    shard(copy)
    data = read_index(copy)
    change(data)
    write_index(copy, data)
    refused(copy, message)


def test_a_tensor_in_two_files_is_refused(copy: Path) -> None:
    first, second, _ = shard(copy)
    tensors = load_file(copy / first)
    save_file(load_file(copy / second) | dict(list(tensors.items())[:1]), copy / second)
    refused(copy, "stands in model-00001-of-00003.safetensors and in model-00002-of-00003.safetensors")


@pytest.mark.parametrize("data", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}, 1, None])
def test_what_is_no_index_is_refused(copy: Path, data: object) -> None:
    shard(copy)
    write_index(copy, data)
    refused(copy, f"{INDEX}(: weight_map is|.* expected an object|.* no 'weight_map')")


def test_an_index_of_thousands_of_files_is_refused(copy: Path) -> None:
    shard(copy)
    write_index(copy, {"weight_map": {f"t{number}": f"m{number}.safetensors" for number in range(1001)}})
    refused(copy, "names more than 1000 files")
