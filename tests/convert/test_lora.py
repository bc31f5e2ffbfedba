"""A LoRA is merged before export: only what it touches is converted again, and the bundle says what is in it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.inputs import sample_inputs
from sa3_convert.checkpoint.lora_file import LoraRequest
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.cli import app as cli
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.drift.drift import key_of
from sa3_convert.networks.build import build_network
from sa3_convert.ort import OrtSession
from sa3_convert.passes.pipeline import load_onnx
from sa3_convert.runtime.audio import read_metadata
from sa3_convert.system.files import sha256_file
from tests.bundles import CONFIGS, Convert
from tests.checkpoint.adapters import SECONDS, toy_adapter

NUMBER = Component.NUMBER_CONDITIONER


@pytest.fixture(scope="module")
def adapter(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that touches the number conditioner alone, which converts in a second."""
    return toy_adapter(tmp_path_factory.mktemp("loras") / "warm.safetensors", toy, "bora", [SECONDS])


@pytest.fixture(scope="module")
def adapted(converted: Convert, toy: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    converted(toy, "fp32", tmp_path_factory.mktemp("plain"))
    outcome, runs = converted(toy, "fp32", tmp_path_factory.mktemp("adapted"), loras=[LoraRequest(adapter, 0.5)])
    assert runs.done() == {("number_conditioner", stage) for stage in ("export", "mnn", "verify")}
    return outcome.bundle


def test_only_what_a_lora_touches_is_converted_again(adapted: Bundle, toy_fp32: Bundle) -> None:
    for component in Component:
        same = adapted.artifact(component).sha256 == toy_fp32.artifact(component).sha256
        assert same == (component is not NUMBER)
    adapted.check(kinds=("mnn", "onnx"))


def test_the_manifest_names_the_lora(adapted: Bundle, adapter: Path) -> None:
    (entry,) = Bundle.open(adapted.path).manifest.loras
    assert (entry.name, entry.sha256) == ("warm.safetensors", sha256_file(adapter))
    assert (entry.strength, entry.type, entry.rank, entry.alpha) == (0.5, "bora", 4, 8.0)
    assert entry.layers == {NUMBER: 1}


def test_the_converted_model_computes_with_the_merged_weights(adapted: Bundle, toy: Path, adapter: Path) -> None:
    checkpoint = Checkpoint.open(toy).with_loras([LoraRequest(adapter, 0.5)])
    network = build_network(NUMBER, checkpoint.layout, checkpoint.state(NUMBER))
    sample = sample_inputs(NUMBER, checkpoint.layout, seed=0, latents=0)
    import torch

    expected = network(*(torch.from_numpy(value) for value in sample.feeds.values())).numpy()
    found = OrtSession(adapted.file(NUMBER, "onnx")).run(sample.feeds)["embedding"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    plain = build_network(NUMBER, checkpoint.layout, Checkpoint.open(toy).state(NUMBER))
    assert np.abs(plain(*(torch.from_numpy(v) for v in sample.feeds.values())).numpy() - expected).max() > 0.01


def test_the_same_again_does_nothing(converted: Convert, toy: Path, adapter: Path, adapted: Bundle) -> None:
    assert converted(toy, "fp32", adapted.path, loras=[LoraRequest(adapter, 0.5)])[0].up_to_date


def test_other_loras_replace_a_bundle_only_by_force(
    converted: Convert, toy: Path, adapter: Path, adapted: Bundle, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(adapted.path, tmp_path / "copy"))
    before = (copy / "manifest.json").read_bytes()
    digest = sha256_file(adapter)[:12]
    namesake = toy_adapter(tmp_path / "warm.safetensors", toy, "lora", [SECONDS])
    other = sha256_file(namesake)[:12]
    for loras, named in (
        ([], "no LoRA"),
        ([LoraRequest(adapter, -0.5)], rf"LoRAs warm.safetensors:-0.5 \({digest}\)"),
        ([LoraRequest(namesake, 0.5)], rf"LoRAs warm.safetensors:0.5 \({other}\)"),
    ):
        said = rf"holds a bundle of .* and LoRAs warm.safetensors:0.5 \({digest}\); .* and {named}\. .*--force"
        with pytest.raises(UsageError, match=said):
            converted(toy, "fp32", copy, loras=loras, components=(NUMBER,))
        assert (copy / "manifest.json").read_bytes() == before
    forced = {"components": (NUMBER,), "force": True}
    outcome, runs = converted(toy, "fp32", copy, loras=[LoraRequest(adapter, -0.5)], **forced)
    assert ("number_conditioner", "export") in runs.done()
    assert outcome.bundle.manifest.loras[0].strength == -0.5


def test_a_plain_bundle_is_not_replaced_by_one_with_loras(
    toy: Path, adapter: Path, toy_fp32: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    before = toy_fp32.manifest.to_json()
    command = ["convert", str(toy), "--recipe", str(CONFIGS / "fp32.yaml"), "--out", str(toy_fp32.path)]
    for dry_run in ([], ["--dry-run"]):
        assert cli.run([*command, "--lora", f"{adapter}:0.0", *dry_run]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "with recipe 'fp32' and no LoRA; this would replace it by small-music" in said
        assert "LoRAs warm.safetensors:0 (" in said
    assert (toy_fp32.path / "manifest.json").read_text() == before


def test_a_renamed_lora_is_the_same_one_and_the_manifest_follows(
    converted: Convert, toy: Path, adapter: Path, adapted: Bundle, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(adapted.path, tmp_path / "copy"))
    renamed = Path(shutil.copy(adapter, tmp_path / os.fsdecode(b"w\xe4rm.safetensors")))
    outcome, runs = converted(toy, "fp32", copy, loras=[LoraRequest(renamed, 0.5)], components=(NUMBER,))
    assert runs.done() == set()
    assert Bundle.open(copy).manifest.loras[0].name == "w\\udce4rm.safetensors"
    assert not outcome.up_to_date


def test_without_effect_a_lora_is_noted_and_nothing_converted(
    converted: Convert, toy: Path, adapter: Path, toy_fp32: Bundle, tmp_path: Path
) -> None:
    outcome, runs = converted(toy, "fp32", tmp_path / "out", loras=[LoraRequest(adapter, 0.0)])
    assert runs.done() == set()
    assert outcome.bundle.manifest.loras[0].layers == {}


def test_components_of_other_weights_are_not_left_in_a_bundle(converted: Convert, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(toy, "fp32", out, components=(NUMBER,))
    synthesize(tmp_path / "other", "small-music", "toy", 1, "gaussian")
    with pytest.raises(UsageError, match=r"number_conditioner in .* other weights"):
        converted(tmp_path / "other", "fp32", out, components=(Component.DECODER,))
    outcome, _ = converted(tmp_path / "other", "fp32", out, components=(Component.DECODER,), force=True)
    assert outcome.bundle.components == (Component.DECODER,)


def test_the_audio_says_which_loras_made_it(adapted: Bundle, adapter: Path, tmp_path: Path) -> None:
    wav = tmp_path / "out.wav"
    arguments = ["run", str(adapted.path), "--prompt", "pad", "--seconds", "1", "--steps", "1", "-o", str(wav)]
    assert cli.run(arguments) == 0
    assert read_metadata(wav)["loras"] == [
        {"name": "warm.safetensors", "sha256": sha256_file(adapter), "strength": 0.5}
    ]


def test_whatever_names_the_bundle_names_the_lora(
    adapted: Bundle, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = f"small-music + warm.safetensors:0.5 ({sha256_file(adapter)[:12]})"
    assert adapted.manifest.label == key_of(adapted)[0] == label
    report, figures = tmp_path / "report", tmp_path / "figures.json"
    verify = ["verify", str(adapted.path), "--component", NUMBER.value, "--quick", "--no-bisect"]
    assert cli.run([*verify, "--json", str(figures), "--report", str(report)]) == 0
    assert json.loads(figures.read_text())["bundle"] == label
    assert json.loads((report / "report.json").read_text())["made"]["variant"] == label
    assert label in (report / "summary.md").read_text()
    assert label in (report / "index.html").read_text()
    capsys.readouterr()
    assert cli.run(["table", str(adapted.path)]) == 0
    assert label in capsys.readouterr().out
    assert cli.run(["bundle", "export", str(adapted.path), "--to", str(tmp_path / "site")]) == 0
    (published,) = (tmp_path / "site").glob("music_warm-*/fp32/number_conditioner_*")
    assert published.name.startswith("number_conditioner_music_warm-")
    assert (tmp_path / "site" / "music" / "fp32" / "dit_music_fp32.mnn").is_file()


def test_the_torch_engine_needs_the_same_loras(
    adapted: Bundle, adapter: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wav = str(tmp_path / "out.wav")
    run = ["run", str(adapted.path), "--prompt", "pad", "--seconds", "1", "--steps", "1", "-o", wav]
    torch = [*run, "--engine", "torch", "--checkpoint", str(toy)]
    assert cli.run(torch) == 3
    assert "--lora (warm.safetensors:0.5)" in " ".join(capsys.readouterr().err.split())
    assert cli.run([*torch, "--lora", f"{adapter}:0.5"]) == 0
    assert cli.run([*run, "--lora", str(adapter)]) == 2


def test_the_command_line_lists_what_a_lora_changes(
    toy: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(CONFIGS / "fp32.yaml")
    convert = ["convert", str(toy), "--recipe", recipe, "--out", str(tmp_path / "out"), "--dry-run"]
    assert cli.run(["--verbose", *convert, "--lora", f"{adapter}:0.25"]) == 0
    # A narrow terminal folds cells.
    listed = "".join(c for c in capsys.readouterr().err if c.isalnum() or c in "._*")
    for word in ("warm.safetensors", "bora", "0.25", SECONDS):
        assert word in listed
    assert cli.run([*convert, "--lora", f"{adapter}:nan"]) == 2
    assert cli.run([*convert, "--lora", "nowhere.safetensors"]) == 3
    assert not (tmp_path / "out").exists()


def test_one_stage_and_a_plan_take_loras_too(
    toy: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = ["--component", NUMBER.value, "--lora", f"{adapter}:0.25"]
    assert cli.run(["plan", str(toy), *lora, "--target-mib", "1", "--out", str(tmp_path / "p.yaml"), "--dry-run"]) == 0
    assert "warm.safetensors: bora, rank 4, alpha 8, strength 0.25" in " ".join(capsys.readouterr().err.split())
    out = tmp_path / "new" / "number.onnx"
    assert cli.run(["export", str(toy), *lora, "--out", str(out)]) == 0
    checkpoint = Checkpoint.open(toy).with_loras([LoraRequest(adapter, 0.25)])
    merged = checkpoint.state(NUMBER)["embedder.embedding.1.weight"].numpy()
    stored = [value.const_value.numpy() for value in load_onnx(out).graph.initializers.values() if value.const_value]
    assert any(np.array_equal(array, merged) or np.array_equal(array, merged.T) for array in stored)
