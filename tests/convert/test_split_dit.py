"""`convert --with-split-dit`: the DiT in parts beside the bundle's models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.manifest import MANIFEST, SPLIT_KINDS, FileEntry
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import SPECS, Component
from sa3_convert.errors import BundleError, UsageError
from sa3_convert.lab.bench import contenders
from sa3_convert.mnn.converter import mnn_from_onnx
from sa3_convert.mnn.session import MnnSession
from sa3_convert.passes.split import split_onnx
from sa3_convert.recipe import ComponentRecipe
from sa3_convert.runtime.opening import made_by
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from tests.bundles import Convert


@pytest.fixture(scope="module")
def bundle(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return converted(toy, "int8", tmp_path_factory.mktemp("split"), with_split_dit=True)[0].bundle


def test_all_parts_are_there_with_figures(bundle: Bundle) -> None:
    bundle.check(kinds=("mnn", *SPLIT_KINDS))
    whole = bundle.artifact(Component.DIT)
    assert whole.fidelity is not None
    for kind in SPLIT_KINDS:
        part = bundle.artifact(Component.DIT, kind)
        assert part.fidelity is not None
        assert part.fidelity.signal_to_noise_db == pytest.approx(whole.fidelity.signal_to_noise_db, abs=0.1)
    assert not [a for a in bundle.manifest.artifacts if a.kind in SPLIT_KINDS and a.component is not Component.DIT]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_generations_are_those_of_the_whole(bundle: Bundle, guidance: float) -> None:
    request = GenerateRequest("pad", seconds=1.0, steps=3, cfg_scale=guidance)
    whole = Pipeline.from_bundle(bundle.path, threads=2).generate(request)
    split = Pipeline.from_bundle(bundle.path, threads=2, split=True).generate(request)
    np.testing.assert_allclose(split.report.latents, whole.report.latents, atol=1e-5)
    assert split.report.engine["dit"] == "split"
    assert "dit" not in whole.report.engine


def test_files_name_every_part_that_made_them(bundle: Bundle) -> None:
    with Pipeline.from_bundle(bundle.path, "mnn", split=True) as pipeline:
        models = made_by(pipeline)["models"]
    names = {"dit": "mnn-step", "dit_prepare": "mnn-prepare", "dit_time": "mnn-time"}
    for name, kind in names.items():
        assert models[name] == bundle.artifact(Component.DIT, kind).sha256


def test_the_phases_stay_out_of_the_part_that_half_arithmetic_leaves_right(bundle: Bundle) -> None:
    whole, step = bundle.artifact(Component.DIT), bundle.artifact(Component.DIT, "mnn-step")
    assert (whole.lowest_precision, step.lowest_precision) == ("normal", "low")
    assert whole.half_db is not None
    assert step.half_db is not None
    # Halves have 66 dB; some ten roundings in turn leave 55. Lost phases leave less than a model of 4 bits.
    assert whole.half_db < 20
    assert step.half_db > 50
    time = MnnSession(bundle.checked(Component.DIT, "mnn-time").path)
    assert list(time.inputs) == ["t"]
    with Pipeline.from_bundle(bundle.path, precision="low", split=True) as pipeline:
        assert "dit at" not in pipeline.models.engine.settings
        assert pipeline.models.engine.settings["number_conditioner at"] == "normal"


def test_a_bundle_with_the_two_parts_of_older_conversions_still_runs(bundle: Bundle, tmp_path: Path) -> None:
    split_onnx(
        bundle.checked(Component.DIT, "onnx").path,
        {tmp_path / "p.onnx": SPECS[Component.DIT].early_parts["prepare"]},
        tmp_path / "s.onnx",
    )
    folder = tmp_path / "old"
    shutil.copytree(bundle.path, folder)
    recipe = ComponentRecipe(floor_db=1)
    for source, name in (("p", "dit_prepare.mnn"), ("s", "dit_step.mnn")):
        (folder / name).unlink()
        mnn_from_onnx(tmp_path / f"{source}.onnx", folder / name, recipe)
    data = json.loads((folder / MANIFEST).read_text())
    data["artifacts"] = [a for a in data["artifacts"] if a["kind"] != "mnn-time"]
    for artifact in data["artifacts"]:
        artifact.pop("half_db")
        if artifact["kind"] in SPLIT_KINDS:
            artifact |= dict(FileEntry.of(folder, artifact["path"]))
    (folder / MANIFEST).write_text(json.dumps(data))
    request = GenerateRequest("pad", seconds=1.0, steps=2)
    with Pipeline.from_bundle(folder, split=True, precision="low") as old, Pipeline.from_bundle(bundle.path) as new:
        assert old.models.engine.settings["dit at"] == "normal"
        found, expected = (pipeline.generate(request).report.latents for pipeline in (old, new))
    # One of the two is INT8: 37 dB.
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_a_bundle_without_it_says_how_to_get_it(toy_int8: Bundle) -> None:
    with pytest.raises(BundleError, match="--with-split-dit"):
        Pipeline.from_bundle(toy_int8.path, split=True)


def test_only_mnn_has_it(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no option 'split'"):
        Pipeline.from_bundle(bundle.path, "onnxruntime", split=True)
    arguments = ["--prompt", "a", "--engine", "onnxruntime", "--split-dit", "-o", str(tmp_path / "x.wav")]
    assert cli.run(["run", str(bundle.path), *arguments]) == 2


def test_it_is_made_once_and_only_when_asked_for(converted: Convert, toy: Path, tmp_path: Path) -> None:
    plain, _ = converted(toy, "int8", tmp_path / "out")
    assert not [a for a in plain.bundle.manifest.artifacts if a.kind in SPLIT_KINDS]
    assert not converted(toy, "int8", tmp_path / "out", with_split_dit=True)[0].up_to_date
    assert converted(toy, "int8", tmp_path / "out", with_split_dit=True)[0].up_to_date


@pytest.mark.parametrize("name", ["dit_prepare.mnn", "dit_time.mnn", "dit_step.mnn"])
def test_a_damaged_part_is_found_and_made_again(converted: Convert, toy: Path, tmp_path: Path, name: str) -> None:
    made = converted(toy, "int8", tmp_path / "out", with_split_dit=True)[0].bundle
    data = (tmp_path / "out" / name).read_bytes()
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=name):
        Pipeline.from_bundle(made.path, split=True)
    assert not converted(toy, "int8", tmp_path / "out", with_split_dit=True)[0].up_to_date
    assert (tmp_path / "out" / name).read_bytes() == data


def test_bench_compares_it_with_the_whole(bundle: Bundle, toy_int8: Bundle) -> None:
    assert [c.name for c in contenders(bundle.path, ())] == ["mnn", "mnn-low", "mnn-split", "onnxruntime"]
    assert "mnn-split" not in [c.name for c in contenders(toy_int8.path, ())]
