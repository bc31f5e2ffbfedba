"""`convert --with-onnx fp16`: models that compute with halves, for ONNX Runtime on a GPU; judged on the CPU."""

from pathlib import Path

import numpy as np
import pytest

from sa3_convert.bundle.manifest import FileEntry
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.bundle import verify_bundle
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, VerificationError
from sa3_convert.passes import half
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from tests.bundles import Convert
from tests.check.test_bundle import rewrite

KIND = "onnx-fp16"


@pytest.fixture(scope="module")
def bundle(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("with-fp16") / "int8"
    return converted(toy, "int8", out, with_onnx="fp16", with_reference=True)[0].bundle


def test_every_component_has_half_the_bytes_and_nearly_all_of_the_fidelity(bundle: Bundle) -> None:
    for component in Component:
        artifact, reference = bundle.artifact(component, KIND), bundle.artifact(component, "onnx")
        assert artifact.precision == "fp16"
        assert artifact.floor_db == half.FLOORS_DB[component]
        assert artifact.fidelity is not None
        assert artifact.fidelity.signal_to_noise_db > 60
        assert artifact.companion is not None
        assert reference.companion is not None
        assert artifact.companion.bytes < 0.52 * reference.companion.bytes


def test_the_engine_generates_nearly_what_the_reference_does(bundle: Bundle) -> None:
    request = GenerateRequest("pad", seconds=1.0, steps=2)
    exact, halves = (
        Pipeline.from_bundle(bundle.path, engine, threads=1).generate(request)
        for engine in ("onnxruntime", "onnxruntime-fp16")
    )
    assert halves.report.engine["engine"] == "onnxruntime-fp16"
    difference = exact.report.latents - halves.report.latents
    assert 0 < np.square(difference).mean() < 1e-4 * np.square(exact.report.latents).mean()


def test_a_bundle_without_it_says_how_to_get_it(toy_int8: Bundle) -> None:
    with pytest.raises(BundleError, match="--with-onnx fp16"):
        Pipeline.from_bundle(toy_int8.path, "onnxruntime-fp16")


def test_verify_measures_it_again_and_refuses_the_reference_under_its_name(bundle: Bundle) -> None:
    chosen = (Component.NUMBER_CONDITIONER,)
    verdicts = verify_bundle(bundle, components=chosen, quick=True, threads=1).verdicts
    assert [(v.engine, v.precision) for v in verdicts] == [("mnn", "int8"), ("onnxruntime-fp16", "fp16")]
    assert verdicts[1].measured_db == pytest.approx(verdicts[1].claimed_db, abs=0.05)
    name = "number_conditioner.onnx"
    for suffix in ("", ".data"):
        place = bundle.path / "onnxruntime-fp16" / f"{name}{suffix}"
        place.write_bytes((bundle.path / "reference" / f"{name}{suffix}").read_bytes())
    entries = [dict(FileEntry.of(bundle.path, f"onnxruntime-fp16/{name}{suffix}")) for suffix in ("", ".data")]
    changed = rewrite(bundle.path, chosen[0], KIND, **entries[0], companion=entries[1])
    with pytest.raises(VerificationError, match=r"not the fp16 form of its reference. It has \d+ float32 weights"):
        verify_bundle(changed, components=chosen, quick=True)


def test_below_its_floor_nothing_is_made(
    converted: Convert, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "FLOORS_DB", dict.fromkeys(Component, 299))
    with pytest.raises(VerificationError):
        converted(
            toy,
            "int8",
            tmp_path / "out",
            with_onnx="fp16",
            components=(Component.NUMBER_CONDITIONER,),
            cache=tmp_path / "cache",
        )
    assert not (tmp_path / "out" / "manifest.json").exists()
