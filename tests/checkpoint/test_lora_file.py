"""An adapter file that cannot be applied exactly as it was trained is refused, by what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sa3_convert.checkpoint.lora_file import LoraRequest, contains_any, expanded, read_lora
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.errors import InputError, UsageError
from tests.checkpoint.adapters import CONV, QKV, SECONDS, Factors, key, toy_adapter


@pytest.fixture
def path(small_toy: Path, tmp_path: Path) -> Path:
    return toy_adapter(tmp_path / "a.safetensors", small_toy)


def rewrite(path: Path, tensors: Factors, **config: Any) -> None:
    save_file(tensors, path, {"lora_config": json.dumps(config)} if config else None)


def refused(checkpoint: Path, path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint.open(checkpoint).with_loras([LoraRequest(path)])
    assert caught.value.exit_code == 3
    assert path.name in str(caught.value)


@pytest.mark.parametrize("name", ["style.ckpt", "style.pt", "style.safetensors"])
def test_a_pickle_is_refused_unread_with_how_to_convert_it(small_toy: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04" + b"\0" * 100)
    refused(small_toy, tmp_path / name, "pickled.*convert_lora_ckpt_to_safetensors")


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_like_a_pickle_is_read(small_toy: Path, path: Path, length: int) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip().ljust(length)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    assert (len(header), path.read_bytes()[0]) == (length, 0x80)
    assert Checkpoint.open(small_toy).with_loras([LoraRequest(path)]).loras


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_told(small_toy: Path, path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep % len(content)])
    refused(small_toy, path, "truncated")


def test_a_missing_file_and_a_folder_are_told(small_toy: Path, tmp_path: Path) -> None:
    refused(small_toy, tmp_path / "nowhere.safetensors", "missing")
    refused(small_toy, tmp_path, "not a file")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_told(small_toy: Path, path: Path, value: float) -> None:
    tensors = load_file(path)
    tensors[key(QKV, "lora_B")][3, 1] = value
    rewrite(path, tensors, rank=4)
    refused(small_toy, path, r"lora_B\[3, 1\] is not a finite number")


def test_an_adapter_for_another_program_is_told(small_toy: Path, tmp_path: Path) -> None:
    save_file({"lora_unet_down.lora_up.weight": np.ones((4, 4), np.float32)}, tmp_path / "a.safetensors")
    refused(small_toy, tmp_path / "a.safetensors", "lora_unet_down has no lora_A")


def test_a_file_without_tensors_is_told(small_toy: Path, tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    refused(small_toy, tmp_path / "a.safetensors", "no tensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adapter_type": "loha"}, "of the type 'loha'; known: lora, dora-rows, dora-cols, bora, lora-xs"),
        ({"adapter_type": 3}, "of the type 3"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": None}, "rank is None"),
        ({"rank": True}, "rank is True"),
        ({"rank": 2**31}, "rank is 2147483648, expected a positive integer"),
        ({"rank": 10**399}, "is not JSON: a whole number has more than 64 bits"),
        ({"alpha": 10**399}, "is not JSON: a whole number has more than 64 bits"),
        ({"alpha": True}, "alpha is True"),
        ({"include": ["a"] * 20_000}, "include stands for more than 10000 texts"),
        ({"include": ["[0-99][0-99]"] * 2}, "include stands for more than 10000 texts"),
        ({"include": [f"[0-{10**399}]"]}, "stands for more than"),
        ({"include": {"a": 1}}, "include is {'a': 1}"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
        ({"use_rslora": 2}, "use_rslora is 2, expected true or false"),
        ({"use_dora": True}, "use_dora is True, which is not supported; only False is"),
        ({"rank_pattern": {"to_q": 8}}, "rank_pattern is {'to_q': 8}, which is not supported"),
        ({"alpha_pattern": {"to_q": 8}}, "alpha_pattern is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"lora_alpha": 1}, "lora_alpha is 1, which is not supported; only 8 is"),
        ({"r": 16}, "lora_config.r is 16, which is not supported; only 4 is"),
        ({"alpha": "8"}, "alpha is '8'"),
        ({"alpha": float("nan")}, "is not JSON: NaN is no number"),
        ({"include": "layers"}, "include is 'layers'"),
        ({"exclude": [1]}, r"exclude is \[1\]"),
        ({"include": ["layers.[0-999999999]"]}, "stands for more than"),
        ({"rank": 8}, "lora_A has shape"),
        ({"adapter_type": "dora-rows"}, "has no magnitude"),
        ({"adapter_type": "lora-xs"}, "has no M_xs"),
        ({"include": []}, "changes nothing"),
        ({"include": ["no_such_layer"]}, r"changes nothing: .*include \['no_such_layer'\].* none of the 2"),
        ({"exclude": ["to_qkv", "conv"]}, "changes nothing"),
    ],
)
def test_a_configuration_that_cannot_be_is_told(
    small_toy: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    refused(small_toy, toy_adapter(tmp_path / "a.safetensors", small_toy, config=config), message)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '"lora"',
        "[" * 100_000,
        '{"adapter_type":' + "[" * 60 + "]" * 60 + "}",
        '{"adapter_type":' + "[" * 500 + "]" * 500 + "}",
        '{"rank":4,"rank":5}',
        '{"alpha":1e400}',
        '{"alpha":' + "9" * 5000 + "}",
        '{"alpha":-Infinity}',
        '{"include":["\\ud800"]}',
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_configuration_is_told(small_toy: Path, path: Path, text: str) -> None:
    save_file(load_file(path), path, {"lora_config": text})
    refused(small_toy, path, "lora_config in its header|of the type")


def test_what_a_configuration_notes_besides_does_not_matter(small_toy: Path, tmp_path: Path) -> None:
    notes = {"dropout": 0.1, "steps": 500, "r": 4, "lora_alpha": 8, "use_dora": False, "rank_pattern": {}}
    path = toy_adapter(tmp_path / "a.safetensors", small_toy, config={**notes, "trained_on": ["a"], "use_rslora": None})
    lora = read_lora(path)
    assert (lora.rank, lora.alpha, lora.rank_stabilised) == (4, 8.0, False)


def test_what_counts_in_an_adapter_is_no_factor(small_toy: Path, path: Path) -> None:
    counter = {key(QKV, "lora_dropout_mask"): np.ones((1, 4), np.int64)}
    save_file(load_file(path) | counter, path, {"lora_config": json.dumps({"rank": 4})})
    assert Checkpoint.open(small_toy).with_loras([LoraRequest(path)]).loras


def test_factors_that_are_no_floats_are_told(small_toy: Path, path: Path) -> None:
    tensors = load_file(path)
    tensors[key(QKV, "lora_B")] = tensors[key(QKV, "lora_B")].astype(np.int8)
    rewrite(path, tensors, rank=4)
    refused(small_toy, path, "lora_B is stored as I8; only F32, F16, BF16 are supported")


def test_an_index_is_no_adapter(small_toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    refused(small_toy, path, "no safetensors file")


def test_a_name_longer_than_the_system_takes_is_a_name() -> None:
    assert LoraRequest.parse("x" * 5000 + ":0.5") == LoraRequest(Path("x" * 5000), 0.5)


def test_magnitudes_in_a_file_that_says_lora_are_told(small_toy: Path, path: Path) -> None:
    toy_adapter(path, small_toy, "dora-rows", config={"adapter_type": "lora"})
    refused(small_toy, path, "magnitude, which lora has not")


def test_half_of_a_layer_is_told(small_toy: Path, path: Path) -> None:
    tensors = load_file(path)
    del tensors[key(CONV, "lora_A")]
    rewrite(path, tensors, rank=4)
    refused(small_toy, path, f"{CONV} has no lora_A")


def test_an_adapter_of_another_variant_is_told(small_toy: Path, path: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "medium", "medium")
    refused(tmp_path / "medium", path, r"does not fit .*\(medium\).*to_qkv.lora_B has shape.*another variant")


@pytest.mark.parametrize(
    "layer",
    [
        "model.transformer.layers.77.self_attn.to_qkv",
        "model.transformer.layers.0.pre_norm",
        "transformer.layers.0.self_attn.to_qkv",
        "conditioners.prompt.model.layers.0.self_attn.q_proj",
        "pretransform.model.encoder.layers.2",
    ],
)
def test_a_layer_that_the_checkpoint_has_not_is_told(small_toy: Path, path: Path, layer: str) -> None:
    tensors = {name.replace(CONV, layer): value for name, value in load_file(path).items()}
    rewrite(path, tensors, rank=4)
    refused(small_toy, path, f"there is no layer {layer}")


def test_a_rank_above_the_weights_has_no_bases(small_toy: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy, "lora-xs", [CONV], rank=33)
    refused(small_toy, path, "rank 33 is above")


def test_one_base_without_the_other_is_told(small_toy: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy, "lora-xs", [CONV])
    rewrite(path, load_file(path) | {key(CONV, "U"): np.ones((32, 4), np.float32)}, adapter_type="lora-xs")
    refused(small_toy, path, "one of U and V without the other")


def test_without_a_configuration_the_rank_is_the_tensors_and_alpha_the_rank(small_toy: Path, path: Path) -> None:
    rewrite(path, load_file(path))
    lora = read_lora(path)
    assert (lora.type_name, lora.rank, lora.alpha) == ("lora", 4, 4.0)


def test_ranks_that_differ_must_be_stated(small_toy: Path, path: Path, tmp_path: Path) -> None:
    other = toy_adapter(tmp_path / "b.safetensors", small_toy, layers=[SECONDS], rank=2)
    rewrite(path, load_file(path) | load_file(other))
    refused(small_toy, path, "rank is None")


@pytest.mark.parametrize(("kind", "axis"), [("dora-rows", 1), ("dora-cols", 0)])
def test_the_older_name_dora_is_told_apart_by_its_magnitudes(
    small_toy: Path, tmp_path: Path, kind: str, axis: int
) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy, kind)
    tensors = {
        name: np.expand_dims(value, axis) if name.endswith("magnitude") else value
        for name, value in load_file(path).items()
    }
    rewrite(path, tensors, adapter_type="dora", rank=4)
    (lora,) = Checkpoint.open(small_toy).with_loras([LoraRequest(path)]).loras
    assert lora.file.type_name == kind


def test_dora_with_flat_magnitudes_is_of_rows(small_toy: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", small_toy, "dora-rows", config={"adapter_type": "dora"})
    assert read_lora(path).type_name == "dora-rows"


def test_what_training_alone_needs_is_passed_over(small_toy: Path, path: Path) -> None:
    rewrite(path, load_file(path) | {key(QKV, "lora_dropout_mask"): np.ones((1, 128), np.float16)}, rank=4)
    assert Checkpoint.open(small_toy).with_loras([LoraRequest(path)]).loras


def test_filters_leave_layers_out(small_toy: Path, tmp_path: Path) -> None:
    layers = [f"model.transformer.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("to_qkv", "to_out")]
    config = {"include": ["layers.[1-5].self_attn", "conditioners"], "exclude": ["to_out"]}
    path = toy_adapter(tmp_path / "a.safetensors", small_toy, layers=[*layers, SECONDS], config=config)
    (lora,) = Checkpoint.open(small_toy).with_loras([LoraRequest(path)]).loras
    assert set(lora.layers.values()) == {"model.transformer.layers.1.self_attn.to_qkv", SECONDS}


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("to_qkv", ["to_qkv"]),
        ("layers.[0-2].ff", ["layers.0.ff", "layers.1.ff", "layers.2.ff"]),
        ("layers[10-9]", ["layers9", "layers10"]),
        ("[0-1].x.[3-4]", ["0.x.3", "0.x.4", "1.x.3", "1.x.4"]),
        ("[a-b]", ["[a-b]"]),
        ("[1-]", ["[1-]"]),
        ("", [""]),
    ],
)
def test_brackets_are_ranges_of_numbers(pattern: str, texts: list[str]) -> None:
    assert expanded(pattern) == texts


def test_filters_are_parts_of_names_not_whole_words() -> None:
    assert contains_any("model.transformer.layers.12.ff", ["layers.1"])
    assert not contains_any("model.transformer.layers.2.ff", ["layers.1"])
    assert not contains_any("anything", [])


@given(first=st.integers(0, 40), last=st.integers(0, 40), number=st.integers(0, 60))
def test_a_range_admits_what_starts_with_one_of_its_numbers(first: int, last: int, number: int) -> None:
    numbers = range(min(first, last), max(first, last) + 1)
    admitted = contains_any(f"layers.{number}", expanded(f"layers.[{first}-{last}]"))
    assert admitted == any(str(number).startswith(str(n)) for n in numbers)


strengths = st.floats(-1e6, 1e6).map(lambda value: repr(float(value)))
names = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(lambda n: not n.startswith("~"))


@given(name=names, strength=strengths)
def test_the_strength_is_what_follows_the_last_colon(name: str, strength: str) -> None:
    assert LoraRequest.parse(f"{name}/x:{strength}") == LoraRequest(Path(f"{name}/x"), float(strength))


@given(name=names)
def test_a_name_that_ends_in_no_number_is_a_name(name: str) -> None:
    assert LoraRequest.parse(f"{name}:x.safetensors") == LoraRequest(Path(f"{name}:x.safetensors"))


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.5", r"C:\loras\a.safetensors", 0.5),
        ("C:/loras/a.safetensors:-2", "C:/loras/a.safetensors", -2.0),
        ("a:b:1e-1", "a:b", 0.1),
        ("a.safetensors:", "a.safetensors:", 1.0),
        ("a:.5", "a", 0.5),
        ("a:0", "a", 0.0),
        ("a:1_0", "a:1_0", 1.0),
    ],
)
def test_files_and_strengths(text: str, path: str, strength: float) -> None:
    assert LoraRequest.parse(text) == LoraRequest(Path(path), strength)


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:-Infinity", "a:1e999", ":0.5", ""])
def test_what_is_no_file_with_a_finite_strength_is_exit_2(text: str) -> None:
    with pytest.raises(UsageError, match="--lora"):
        LoraRequest.parse(text)


def test_a_file_whose_name_looks_like_a_strength_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("style:2").touch()
    assert LoraRequest.parse("style:2") == LoraRequest(Path("style:2"))
    assert LoraRequest.parse("style:2:0.5") == LoraRequest(Path("style:2"), 0.5)


def test_a_layer_under_its_name_in_the_checkpoint_is_none_of_a_published_file(small_toy: Path, tmp_path: Path) -> None:
    """The reference finds layers from below the conditioner; this one would change none there."""
    ours = load_file(toy_adapter(tmp_path / "ours", small_toy, "lora", [SECONDS]))
    rewrite(tmp_path / "a.safetensors", {f"conditioner.{name}": value for name, value in ours.items()}, rank=4)
    refused(small_toy, tmp_path / "a.safetensors", r"there is no layer conditioner\.conditioners")


def test_a_home_folder_that_nobody_has_is_told() -> None:
    with pytest.raises(UsageError, match="no such home folder"):
        LoraRequest.parse("~nobody-is-called-so/a.safetensors:0.5")
