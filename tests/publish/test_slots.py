"""Models that take adapters, handed on: what was exported runs as it did, and `contract.json` alone says how."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli import app
from sa3_convert.components import ADAPTED, Component
from sa3_convert.errors import BundleError
from sa3_convert.publish.card import card
from sa3_convert.publish.export import ORT_INT8, SLOTS, Layout, export_bundles
from sa3_convert.runtime.adapters import Adapters, rank_of, stored_weights
from sa3_convert.runtime.engines import EngineName
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.setting_values import AdapterRequest
from tests.checkpoint.adapters import CONV, QKV, SECONDS, toy_adapter

REQUEST = {"prompt": "pad", "seconds": 1.0, "steps": 1, "seed": 3}


def latents(bundle: Path, engine: EngineName, adapter: AdapterRequest) -> NDArray[np.float32]:
    request = GenerateRequest(**REQUEST, adapters=(adapter,))  # type: ignore[arg-type]
    with Pipeline.from_bundle(bundle, engine, threads=1) as pipeline:
        return pipeline.generate(request, allow=["clipping"]).report.latents


@pytest.mark.parametrize("layout", ["hub", "flat"])
def test_what_was_exported_takes_adapters_as_the_bundle_does(
    toy: Path, toy_int8_slots: Bundle, tmp_path: Path, layout: Layout
) -> None:
    export_bundles([toy_int8_slots], tmp_path / "out", layout, forms=[ORT_INT8, SLOTS])
    found = Bundle.open(tmp_path / "out").path
    adapter = AdapterRequest(toy_adapter(tmp_path / "a.safetensors", toy, "dora-rows"), 0.5)
    engines: tuple[EngineName, ...] = ("mnn", "onnxruntime-int8")
    for engine in engines:
        np.testing.assert_array_equal(
            latents(found, engine, adapter), latents(toy_int8_slots.path, engine, adapter), err_msg=engine
        )


def test_without_being_asked_none_are_written_and_what_is_not_there_cannot_be(
    toy_int8: Bundle, toy_int8_slots: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bundle", "export", "--to", str(tmp_path / "out")]
    assert app.run([*arguments, str(toy_int8_slots.path)]) == 0
    assert not [path for path in (tmp_path / "out").rglob("*") if "slots" in path.name]
    assert "adapters" not in json.loads(next((tmp_path / "out").rglob("contract.json")).read_text())
    assert "mnn-slots" in capsys.readouterr().err
    assert app.run([*arguments, str(toy_int8_slots.path), "--with-adapter-slots", "--force"]) == 0
    assert len(list((tmp_path / "out").rglob("*_slots.mnn"))) == len(ADAPTED)
    with pytest.raises(BundleError, match=r"that take adapters\. Convert again with --adapter-slots 16"):
        export_bundles([toy_int8], tmp_path / "other", "hub", forms=[SLOTS])


def packed(contract: dict[str, Any], component: str, file: Path, strength: float) -> dict[str, NDArray[np.float32]]:
    """Return what a model takes for a file of type `lora`, as `contract.json` says, with its words alone."""
    model, tensors = contract["adapters"]["models"][component], load_file(file)
    rank = model["rank"]
    with safe_open(file, "np") as opened:
        config = json.loads(opened.metadata()["lora_config"])
    inner, outer = (
        np.zeros(port["shape"], np.float32) for port in model["inputs"] if port["name"].startswith("adapter_")
    )
    for layer in model["layers"]:
        name = f"{model['prefix']}{layer['layer']}"
        key = f"{name}.parametrizations.weight.0."
        if f"{key}lora_A" in tensors and not any(text in name for text in config["exclude"]):
            a = tensors[f"{key}lora_A"].astype(np.float32)
            b = tensors[f"{key}lora_B"].astype(np.float32) * np.float32(strength * config["alpha"] / config["rank"])
            fan_in, fan_out = layer["fan_in"], layer["fan_out"]
            wide_a, wide_b = np.zeros((fan_in, rank), np.float32), np.zeros((rank, fan_out), np.float32)
            wide_a[:, : len(a)], wide_b[: len(a)] = a.T, b.T
            start = layer["inner"] * (1 + rank) + fan_in
            inner[start : start + wide_a.size] = wide_a.ravel()
            start = layer["outer"] * (1 + rank) + fan_out
            outer[start : start + wide_b.size] = wide_b.ravel()
    return {"adapter_inner": inner, "adapter_outer": outer}


def test_an_app_packs_a_file_by_the_contract_alone(toy: Path, toy_int8_slots: Bundle, tmp_path: Path) -> None:
    export_bundles([toy_int8_slots], tmp_path / "out", "hub", forms=[SLOTS])
    contract = json.loads(next((tmp_path / "out").rglob("contract.json")).read_text())
    file = toy_adapter(tmp_path / "a.safetensors", toy, "lora", [QKV, CONV, SECONDS], config={"exclude": ["_conv"]})
    adapters = Adapters(toy_int8_slots.layout, rank_of(toy_int8_slots, "mnn"), stored_weights(toy_int8_slots))
    for component in ADAPTED:
        wanted = adapters.composed(component, [AdapterRequest(file, 0.5)]).feeds
        found = packed(contract, component.value, file, 0.5)
        assert any(array.any() for array in wanted.values())
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{component} {name}")
        model = contract["adapters"]["models"][component.value]
        assert Bundle.open(tmp_path / "out").artifact(component, SLOTS).sha256 == model["sha256"]
    assert set(contract["adapters"]["files"]) >= {
        "tensors",
        "filters",
        "lora",
        "several",
        "dora-rows",
        "dora-cols",
        "bora",
        "inputs",
    }


def test_the_card_lists_them_with_rank_and_fidelity(toy_int8: Bundle, toy_int8_slots: Bundle) -> None:
    text = card({"": toy_int8_slots.manifest})
    section = text.partition("## Adapters")[2].partition("\n## ")[0]
    dit = toy_int8_slots.artifact(Component.DIT, SLOTS)
    assert dit.fidelity is not None
    row = next(line for line in section.splitlines() if f"`{dit.path}`" in line)
    assert f"| {dit.rank} |" in row
    assert f"{dit.fidelity.signal_to_noise_db:.1f} dB" in row
    assert "--adapter" in section
    assert "## Adapters" not in card({"": toy_int8.manifest})
