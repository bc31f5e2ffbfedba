"""Files of other trainers do what the same adapter does under the reference's names, or are refused by key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sa3_convert.checkpoint.lora_file import LoraRequest
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component
from sa3_convert.errors import CheckpointError, LoraError
from tests.checkpoint.adapters import QKV, toy_adapter

FF = "model.transformer.layers.1.ff.ff.0.proj"
Tensors = dict[str, Any]


def merged(checkpoint: Path, path: Path) -> Tensors:
    opened = Checkpoint.open(checkpoint).with_loras([LoraRequest(path, 0.7)])
    return {name: tensor.numpy() for name, tensor in opened.state(Component.DIT).items()}


def renamed(source: Path, target: Path, name: Callable[[str, str], str], more: Tensors, **header: Any) -> Path:
    tensors = {}
    for key, value in load_file(source).items():
        layer, _, factor = key.rpartition(".parametrizations.weight.0.")
        tensors[name(layer, factor)] = value
    save_file(tensors | more, target, {key: json.dumps(value) for key, value in header.items()} or None)
    return target


def kohya(layer: str, factor: str) -> str:
    way = {"lora_A": "lora_down", "lora_B": "lora_up"}[factor]
    return f"lora_unet_{layer.removeprefix('model.').replace('.', '_')}.{way}.weight"


def peft(layer: str, factor: str) -> str:
    part = "lora_magnitude_vector" if factor == "magnitude" else f"{factor}.weight"
    return f"base_model.model.{layer.removeprefix('model.')}.{part}"


def diffusers(layer: str, factor: str) -> str:
    return f"transformer.{layer.removeprefix('model.')}.{factor}.weight"


def test_kohya_files_state_alpha_by_layer(small_toy: Path, tmp_path: Path) -> None:
    ours = toy_adapter(tmp_path / "a.safetensors", small_toy, "lora", [QKV, FF])
    alphas = {kohya(layer, "lora_A").replace("lora_down.weight", "alpha"): np.float32(8) for layer in (QKV, FF)}
    theirs = renamed(ours, tmp_path / "kohya.safetensors", kohya, {k: np.array(v) for k, v in alphas.items()})
    expected, found = merged(small_toy, ours), merged(small_toy, theirs)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_ranks_may_differ_by_layer(small_toy: Path, tmp_path: Path) -> None:
    one = toy_adapter(tmp_path / "a.safetensors", small_toy, "lora", [QKV], rank=2, config={"alpha": 2})
    other = toy_adapter(tmp_path / "b.safetensors", small_toy, "lora", [FF], rank=6, config={"alpha": 6})
    first = renamed(one, tmp_path / "1.safetensors", kohya, {})
    both = renamed(other, tmp_path / "2.safetensors", kohya, dict(load_file(first)))
    found, expected = merged(small_toy, both), merged(small_toy, one)
    np.testing.assert_array_equal(
        found["transformer.layers.0.self_attn.to_qkv.weight"], expected["transformer.layers.0.self_attn.to_qkv.weight"]
    )
    ff = "transformer.layers.1.ff.ff.0.proj.weight"
    np.testing.assert_array_equal(found[ff], merged(small_toy, other)[ff])


@pytest.mark.parametrize("kind", ["lora", "dora-rows"])
def test_peft_files_have_their_settings_beside_them(small_toy: Path, tmp_path: Path, kind: str) -> None:
    ours = toy_adapter(tmp_path / "a.safetensors", small_toy, kind, [QKV, FF])
    theirs = renamed(ours, tmp_path / "peft.safetensors", peft, {})
    with pytest.raises(LoraError, match=r"alpha.*adapter_config\.json"):
        merged(small_toy, theirs)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": kind == "dora-rows", "rank_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    expected, found = merged(small_toy, ours), merged(small_toy, theirs)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {"to_qkv": 8}}))
    with pytest.raises(LoraError, match="rank_pattern"):
        merged(small_toy, theirs)


def test_diffusers_files_have_them_in_their_header(small_toy: Path, tmp_path: Path) -> None:
    ours = toy_adapter(tmp_path / "a.safetensors", small_toy, "lora", [QKV, FF])
    header = {"lora_adapter_metadata": {"transformer.r": 4, "transformer.lora_alpha": 8}}
    theirs = renamed(ours, tmp_path / "diffusers.safetensors", diffusers, {}, **header)
    expected, found = merged(small_toy, ours), merged(small_toy, theirs)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_header_for_several_networks_is_refused_where_they_differ(small_toy: Path, tmp_path: Path) -> None:
    ours = toy_adapter(tmp_path / "a.safetensors", small_toy, "lora", [QKV])
    same = {"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 8}
    same |= {"transformer.target_modules": ["to_qkv"], "text_encoder.target_modules": ["q_proj"]}
    expected = merged(small_toy, ours)
    found = merged(small_toy, renamed(ours, tmp_path / "1.safetensors", diffusers, {}, lora_adapter_metadata=same))
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    for name, value in {"lora_alpha": 16, "use_rslora": True}.items():
        other = same | {f"text_encoder.{name}": value}
        theirs = renamed(ours, tmp_path / "2.safetensors", diffusers, {}, lora_adapter_metadata=other)
        with pytest.raises(LoraError, match=rf"{name} of several networks .*transformer.*text_encoder"):
            merged(small_toy, theirs)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("lora_unet_transformer_layers_0_ff_ff_2.hada_w1_a", "hada_w1_a"),
        ("lora_unet_transformer_layers_0_ff_ff_2.dora_scale", "dora_scale"),
        ("lora_te_text_model_encoder.lora_down.weight", "lora_te_text_model_encoder"),
        ("lora_unet_transformer_layers_99_ff_ff_2.lora_down.weight", "layers_99"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(small_toy: Path, tmp_path: Path, more: str, match: str) -> None:
    ours = toy_adapter(tmp_path / "a.safetensors", small_toy, "lora", [QKV])
    strange = {more: np.zeros((4, 8), np.float32)}
    theirs = renamed(ours, tmp_path / "kohya.safetensors", kohya, strange)
    with pytest.raises(LoraError, match=match):
        merged(small_toy, theirs)


def peft_file(small_toy: Path, folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    theirs = renamed(toy_adapter(folder / "ours", small_toy, "lora", [QKV, FF]), folder / "p.safetensors", peft, {})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings))
    return theirs


def test_other_settings_beside_the_same_tensors_are_another_adapter(small_toy: Path, tmp_path: Path) -> None:
    opened = [
        Checkpoint.open(small_toy).with_loras(
            [LoraRequest(peft_file(small_toy, tmp_path / str(alpha), lora_alpha=alpha))]
        )
        for alpha in (8, 4)
    ]
    assert len({one.digest(Component.DIT) for one in opened}) == 2
    assert (
        Checkpoint.open(small_toy)
        .with_loras(
            [LoraRequest(path) for path in (tmp_path / "8" / "p.safetensors", tmp_path / "4" / "p.safetensors")]
        )
        .loras
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"use_qalora": True}, "use_qalora"),
        ({"r": 8}, r"\.r is 8"),
        ({"lora_alpha": 1 << 70}, "more than 64 bits"),
    ],
)
def test_settings_that_change_what_an_adapter_does_are_refused(
    small_toy: Path, tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    """What is told from the weights' singular vectors in training is a step from other weights than these."""
    with pytest.raises((LoraError, CheckpointError), match=match):
        merged(small_toy, peft_file(small_toy, tmp_path, **settings))


def test_settings_that_are_no_object_are_refused(small_toy: Path, tmp_path: Path) -> None:
    path = peft_file(small_toy, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[8]")
    with pytest.raises(LoraError, match="expected a JSON object"):
        merged(small_toy, path)


def test_settings_of_another_file_in_the_folder_are_not_those_of_kohya(small_toy: Path, tmp_path: Path) -> None:
    ours = toy_adapter(tmp_path / "a.safetensors", small_toy, "lora", [QKV], config={"alpha": 4})
    theirs = renamed(ours, tmp_path / "kohya.safetensors", kohya, {})
    peft_file(small_toy, tmp_path, use_rslora=True, lora_alpha=64)
    expected, found = merged(small_toy, ours), merged(small_toy, theirs)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_layer_under_two_names_is_refused(small_toy: Path, tmp_path: Path) -> None:
    ours = toy_adapter(tmp_path / "a.safetensors", small_toy, "lora", [QKV])
    first = renamed(ours, tmp_path / "1.safetensors", diffusers, {})
    header = {"lora_adapter_metadata": {"r": 4, "lora_alpha": 8}}
    both = renamed(ours, tmp_path / "2.safetensors", peft, dict(load_file(first)), **header)
    with pytest.raises(LoraError, match="are the same layer"):
        merged(small_toy, both)
