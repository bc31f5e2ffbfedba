"""`convert --with-ort-int8`: an integer form for ONNX Runtime beside the bundle's models."""

from pathlib import Path

import numpy as np
import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, VerificationError
from sa3_convert.passes import integers
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from tests.bundles import Convert

REQUEST = GenerateRequest("pad", seconds=1.0, steps=2)


@pytest.fixture(scope="module")
def bundle(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return converted(toy, "int8", tmp_path_factory.mktemp("with-int8"), with_ort_int8=True)[0].bundle


def test_every_component_has_an_integer_form_with_figures_of_its_own(bundle: Bundle) -> None:
    bundle.check(kinds=("mnn", "onnx", "onnx-int8"))
    for component in Component:
        artifact = bundle.artifact(component, "onnx-int8")
        assert artifact.fidelity is not None
        assert artifact.floor_db is not None
        assert artifact.fidelity.signal_to_noise_db >= artifact.floor_db
        assert artifact.precision == ("fp32" if component is Component.NUMBER_CONDITIONER else "int8")


def test_the_engine_generates_something_near_the_reference_and_not_equal(bundle: Bundle) -> None:
    engines = ("onnxruntime", "onnxruntime-int8")
    pipelines = [Pipeline.from_bundle(bundle.path, engine, threads=2) for engine in engines]
    exact, integer = (pipeline.generate(REQUEST) for pipeline in pipelines)
    assert integer.report.engine["engine"] == "onnxruntime-int8"
    difference = exact.report.latents - integer.report.latents
    assert np.abs(difference).max() > 0
    assert np.square(difference).mean() < 0.1 * np.square(exact.report.latents).mean()


def test_a_bundle_without_it_says_how_to_get_it(toy_int8: Bundle) -> None:
    with pytest.raises(BundleError, match="--with-ort-int8"):
        Pipeline.from_bundle(toy_int8.path, "onnxruntime-int8")


def test_it_is_made_once_and_only_when_asked_for(converted: Convert, toy: Path, tmp_path: Path) -> None:
    plain, _ = converted(toy, "int8", tmp_path / "out")
    assert not [a for a in plain.bundle.manifest.artifacts if a.kind == "onnx-int8"]
    outcome, runs = converted(toy, "int8", tmp_path / "out", with_ort_int8=True)
    assert not outcome.up_to_date
    assert {stage for _, stage in runs.done()} <= {"ort-int8"}
    assert outcome.bundle.artifact(Component.DIT, "onnx-int8")
    assert converted(toy, "int8", tmp_path / "out", with_ort_int8=True)[0].up_to_date


def test_it_is_copied_into_the_bundle_with_the_reference(converted: Convert, toy: Path, tmp_path: Path) -> None:
    outcome, _ = converted(toy, "int8", tmp_path / "out", with_ort_int8=True, with_reference=True)
    assert (tmp_path / "out" / "onnxruntime-int8" / "dit.onnx.data").is_file()
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert Pipeline.from_bundle(moved, "onnxruntime-int8", threads=2).generate(REQUEST).audio.shape == (2, 44100)
    assert outcome.bundle.artifact(Component.DIT, "onnx-int8").kept_at is None


def test_a_lost_file_is_made_again(converted: Convert, toy: Path, tmp_path: Path) -> None:
    options = {"with_ort_int8": True, "with_reference": True, "components": (Component.NUMBER_CONDITIONER,)}
    converted(toy, "int8", tmp_path / "out", **options)
    (tmp_path / "out" / "onnxruntime-int8" / "number_conditioner.onnx").unlink()
    outcome, _ = converted(toy, "int8", tmp_path / "out", **options)
    assert not outcome.up_to_date
    outcome.bundle.check(kinds=("onnx-int8",))


def test_below_its_floor_nothing_is_made(
    converted: Convert, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integers, "FLOORS_DB", dict.fromkeys(Component, 299))
    options = {"with_ort_int8": True, "components": (Component.ENCODER,), "cache": tmp_path / "cache"}
    with pytest.raises(VerificationError):
        converted(toy, "int8", tmp_path / "out", **options)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "cache" / "ort-int8").iterdir())
