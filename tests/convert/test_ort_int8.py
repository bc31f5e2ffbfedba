"""`convert --with-ort-int8`: an integer form for ONNX Runtime beside the bundle's models."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_convert.arrays import Arrays
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.inputs import sample_inputs
from sa3_convert.cli import app
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, VerificationError
from sa3_convert.ort import OrtSession
from sa3_convert.passes import integers
from sa3_convert.publish.export import ORT_INT8, Layout, export_bundles
from sa3_convert.runtime.engines import EngineName, bundle_engine
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.placement import engine_for
from sa3_convert.runtime.request import GenerateRequest
from tests.bundles import Convert

ENGINE: EngineName = "onnxruntime-int8"
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


def test_the_dit_runs_in_parts_over_the_weights_of_the_whole_and_gives_its_bits(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = bundle.artifact(Component.DIT, "onnx-int8").parts
    assert [Path(part.path).name for part in parts] == ["dit.prepare.onnx", "dit.time.onnx", "dit.step.onnx"]
    assert sum(part.bytes for part in parts) < 2 * bundle.artifact(Component.DIT, "onnx-int8").bytes
    ran: list[str] = []
    original = OrtSession.run

    def run(session: OrtSession, feeds: Arrays) -> dict[str, Any]:
        ran.append(session._path.name)
        return original(session, feeds)

    monkeypatch.setattr(OrtSession, "run", run)
    dit = bundle_engine(bundle, ENGINE, {"threads": 1}).load(Component.DIT)
    whole = OrtSession(bundle.checked(Component.DIT, "onnx-int8").path, threads=1, optimise=True)
    feeds = dict(sample_inputs(Component.DIT, bundle.layout, seed=0, latents=16).feeds)
    for t in (0.9, 0.5, 0.1):
        feeds["t"] = np.array([t], np.float32)
        np.testing.assert_array_equal(dit.run(feeds)["out"], whole.run(feeds)["out"], strict=True)
    assert {name: ran.count(name) for name in ran} == {
        "dit.prepare.onnx": 1, "dit.time.onnx": 3, "dit.step.onnx": 3, "dit.onnx": 3,
    }  # fmt: skip


def test_a_bundle_without_it_says_how_to_get_it(toy_int8: Bundle) -> None:
    with pytest.raises(BundleError, match="--with-ort-int8"):
        Pipeline.from_bundle(toy_int8.path, "onnxruntime-int8")


def _run(bundle: Bundle, output: Path, *options: str) -> dict[str, Any]:
    """Run a bundle from the command line; return what `--json` tells."""
    told = output.with_suffix(".json")
    arguments = ["run", str(bundle.path), "-o", str(output), "--json", str(told), *options]
    assert app.run(arguments) == 0
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def test_run_takes_the_fastest_engine_tells_it_and_makes_the_same_again(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("--prompt", "pad", "--seconds", "1", "--steps", "1")
    monkeypatch.setattr("sa3_convert.runtime.placement.integer_products", lambda: "avx512_vnni")
    first = _run(bundle, tmp_path / "first.wav", *wanted)
    said = capsys.readouterr()
    assert (first["engine"]["engine"], "avx512_vnni" in first["engine"]["chosen"]) == ("onnxruntime-int8", True)
    assert f"Engine onnxruntime-int8 on cpu: {first['engine']['chosen']}." in said.err
    assert "Engine" not in said.out
    # On a processor that would take MNN, from the audio and from JSON.
    monkeypatch.setattr("sa3_convert.runtime.placement.integer_products", lambda: None)
    for source in ("first.wav", "first.json"):
        again = _run(bundle, tmp_path / "again.wav", "--from", str(tmp_path / source), "--force")
        assert again["engine"]["engine"] == "onnxruntime-int8"
        assert (tmp_path / "again.wav").read_bytes() == (tmp_path / "first.wav").read_bytes()
    assert _run(bundle, tmp_path / "other.wav", *wanted)["engine"]["engine"] == "mnn"


def test_what_was_made_with_other_settings_is_made_again_with_these(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sa3_convert.runtime.placement.integer_products", lambda: "avx512_vnni")
    low = ("--prompt", "pad", "--seconds", "1", "--steps", "1", "--memory", "low")
    assert _run(bundle, tmp_path / "low.wav", *low)["engine"]["memory"] == "low"
    replay = ("--from", str(tmp_path / "low.wav"))
    assert _run(bundle, tmp_path / "again.wav", *replay)["engine"]["memory"] == "low"
    assert (tmp_path / "again.wav").read_bytes() == (tmp_path / "low.wav").read_bytes()
    assert _run(bundle, tmp_path / "normal.wav", *replay, "--memory", "normal")["engine"]["memory"] == "normal"


def test_models_that_are_gone_from_where_they_were_kept_are_not_chosen(
    converted: Convert, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sa3_convert.runtime.placement.integer_products", lambda: "avx512_vnni")
    options = {"with_ort_int8": True, "components": (Component.NUMBER_CONDITIONER,), "cache": tmp_path / "cache"}
    made = converted(toy, "int8", tmp_path / "out", **options)[0].bundle
    assert engine_for(made)[0] == "onnxruntime-int8"
    shutil.rmtree(tmp_path / "cache")
    assert engine_for(made)[0] == "mnn"


@pytest.mark.parametrize(
    ("instruction", "options", "made"),
    [
        ("avx512_vnni", ("--recipe", "int8"), True),
        (None, ("--recipe", "int8"), False),
        (None, ("--recipe", "int8", "--with-ort-int8"), True),
        ("avx512_vnni", ("--recipe", "int8", "--no-ort-int8"), False),
        ("avx512_vnni", ("--recipe", "fp16"), False),
    ],
)
def test_convert_makes_it_where_it_will_be_used(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    instruction: str | None,
    options: tuple[str, ...],
    made: bool,
) -> None:
    monkeypatch.setattr("sa3_convert.system.machine.integer_products", lambda: instruction)
    plan = tmp_path / "plan.json"
    assert (
        app.run(["convert", str(toy), "--out", str(tmp_path / "out"), "--dry-run", "--json", str(plan), *options]) == 0
    )
    assert ("ort-int8" in plan.read_text()) is made


@pytest.mark.parametrize("layout", ["hub", "flat"])
def test_an_export_has_it_only_when_asked_for(bundle: Bundle, tmp_path: Path, layout: Layout) -> None:
    export_bundles([bundle], tmp_path / "plain", layout)
    assert not [*(tmp_path / "plain").rglob("*.onnx*")]
    export_bundles([bundle], tmp_path / "whole", layout, forms=[ORT_INT8])
    assert len([*(tmp_path / "whole").rglob("dit.*.onnx")]) == 3
    audio = [
        Pipeline.from_bundle(path, ENGINE, threads=2).generate(REQUEST).audio
        for path in (bundle.path, tmp_path / "whole")
    ]
    np.testing.assert_array_equal(*audio)


def test_a_bundle_without_it_is_not_exported_with_it(toy_int8: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="--with-ort-int8"):
        export_bundles([toy_int8], tmp_path / "out", "hub", forms=[ORT_INT8])


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
