"""What audio files and reports tell of the models that made them is what ran, with adapters too."""

import json
from pathlib import Path
from typing import Any

import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli import app
from sa3_convert.components import ADAPTED, Component
from sa3_convert.errors import UsageError
from sa3_convert.runtime.audio import read_metadata
from sa3_convert.runtime.engines import bundle_engine, kinds_of
from sa3_convert.runtime.opening import Opening, made_by
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.serve.worker import Served
from tests.bundles import RANK
from tests.conftest import GOLDEN

LORA = GOLDEN / "small" / "lora" / "lora.safetensors"
KINDS = ("mnn", "mnn-slots", "onnx-slots")
SHORT = {"prompt": "pad", "seconds": 1, "steps": 1}


def hashes(bundle: Bundle, *, slots: bool) -> dict[str, str]:
    """Return the hash of each component's model, of two components that with slots."""
    return {
        component.value: bundle.artifact(component, "mnn-slots" if slots and component in ADAPTED else "mnn").sha256
        for component in bundle.components
    }


def run(bundle: Bundle, output: Path, *options: str) -> int:
    settings = [part for name, value in SHORT.items() for part in (f"--{name}", str(value))]
    return app.run(["run", str(bundle.path), "-o", str(output), *settings, *options])


def test_a_file_names_the_models_that_made_it(toy_slots: Bundle, tmp_path: Path) -> None:
    for name, options in (("plain", []), ("adapted", ["--adapter", str(LORA)])):
        assert run(toy_slots, tmp_path / f"{name}.wav", *options) == 0
        told = read_metadata(tmp_path / f"{name}.wav")
        assert told is not None
        assert told["models"] == hashes(toy_slots, slots=name == "adapted")
    assert hashes(toy_slots, slots=True)["dit"] != hashes(toy_slots, slots=False)["dit"]


def test_lines_of_a_batch_name_their_own(toy_slots: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps({**SHORT, **more}) + "\n" for more in ({}, {"adapters": [str(LORA)]})))
    batch = ["run", str(toy_slots.path), "--batch", str(file), "-o", str(tmp_path / "out")]
    assert app.run(batch) == 0
    told = [read_metadata(tmp_path / "out" / f"{n:04}.wav") or {} for n in (1, 2)]
    assert [one["models"] for one in told] == [hashes(toy_slots, slots=slots) for slots in (False, True)]


def test_what_runs_at_another_precision_is_told_of_the_models_that_run(toy_int8_slots: Bundle) -> None:
    """The DiT with slots is judged by itself; the rest is that of a generation without adapters."""
    with Pipeline.from_bundle(toy_int8_slots.path, "mnn", precision="low") as pipeline:
        plain, adapted = (pipeline.engine(adapters=one).settings for one in (False, True))
    for component in Component:
        kind: Any = "mnn-slots" if component in ADAPTED else "mnn"
        is_low = toy_int8_slots.artifact(component, kind).lowest_precision == "low"
        assert (f"{component.value} at" in adapted) is not is_low
        if component not in ADAPTED:
            assert plain.get(f"{component.value} at") == adapted.get(f"{component.value} at")


def test_of_a_checkpoint_it_is_the_weights(toy: Path, toy_fp32: Bundle) -> None:
    with Pipeline.from_checkpoint(toy) as alone, Pipeline.from_bundle(toy_fp32.path, "torch", checkpoint=toy) as both:
        told = [made_by(one, adapters=adapters)["models"] for one in (alone, both) for adapters in (False, True)]
    assert told == [{c.value: digest for c, digest in toy_fp32.manifest.checkpoint.digests.items()}] * 4


def test_another_checkpoints_weights_are_told_where_the_graph_is_the_same(toy_fp32: Bundle, tmp_path: Path) -> None:
    with Pipeline.from_bundle(toy_fp32.path, "onnxruntime") as pipeline:
        before = made_by(pipeline)["models"]
    assert before == {one.value: toy_fp32.artifact(one, "onnx").content for one in toy_fp32.components}
    weights = toy_fp32.artifact(Component.DIT, "onnx").companion
    assert weights is not None
    assert before["dit"] not in (toy_fp32.artifact(Component.DIT, "onnx").sha256, weights.sha256)


def test_memory_is_that_of_models_with_slots_too(toy: Path, toy_slots: Bundle) -> None:
    sizes = {kind: sum(a.total_bytes for a in toy_slots.manifest.artifacts if a.kind == kind) for kind in KINDS}
    for options, more in (({}, sizes["mnn-slots"] + sizes["onnx-slots"]), ({"memory": "low"}, 2 * sizes["mnn-slots"])):
        opening = Opening(toy_slots.path, "mnn", options)
        assert opening.memory_bytes(adapters=True) - opening.memory_bytes() == more > 0
    alone = Opening(toy, "torch", {})
    assert alone.memory_bytes(adapters=True) > alone.memory_bytes()
    for adapters, wanted in (({}, sizes["mnn"]), ({"warm": LORA}, sizes["mnn"] + sizes["mnn-slots"])):
        assert Served(toy_slots.path, "mnn", {}, adapters=adapters).bytes() == wanted


def test_parts_take_no_adapters(toy_slots: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="takes no adapters"):
        bundle_engine(toy_slots, "mnn", {"split": True}, rank=RANK)
    with pytest.raises(UsageError, match="takes no adapters"):
        kinds_of("mnn", split=True, adapters=True)
    for engine in ("auto", "mnn"):
        options = ["--split-dit", "--adapter", str(LORA), "--engine", engine]
        assert run(toy_slots, tmp_path / "a.wav", *options) == 2
        assert "Leave --split-dit away, or merge them" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a.wav").exists()


def test_with_adapters_no_parts_are_taken_from_the_settings_of_a_file(toy_slots: Bundle, tmp_path: Path) -> None:
    told = tmp_path / "a.json"
    assert run(toy_slots, tmp_path / "a.wav", "--json", str(told)) == 0
    made = json.loads(told.read_text())
    made["engine"]["dit"] = "split"
    told.write_text(json.dumps(made))
    again = ["run", str(toy_slots.path), "--from", str(told), "-o", str(tmp_path / "b.wav"), "--adapter", str(LORA)]
    assert app.run([*again, "--json", str(tmp_path / "b.json")]) == 0
    assert "dit" not in json.loads((tmp_path / "b.json").read_text())["engine"]
