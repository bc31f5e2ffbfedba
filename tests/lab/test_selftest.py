"""The self-test: every engine is held to float32 on the CPU, what is not there is said, and what is wrong fails it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.manifest import MANIFEST
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component
from sa3_convert.errors import BackendError, UsageError, VerificationError
from sa3_convert.lab import selftest as room
from sa3_convert.lab.doctor.results import Answer, Diagnosis, ProbeResult, setting_name
from sa3_convert.lab.selftest import LATENTS, Finding, Made, SelfTest, selftest
from sa3_convert.mnn.compatibility import has_backend
from sa3_convert.runtime.engines import TorchEngine
from tests.bundles import Convert
from tests.publish.test_card import untraced

ENGINES = ("mnn", "mnn-int8", "onnxruntime-fp16", "torch", "torch-fp16")
"""Beside the one that they are held to."""


@pytest.fixture(scope="module")
def toys(converted: Convert, toy: Path, toy_int8: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Made:
    floats = converted(toy, "fp32", tmp_path_factory.mktemp("fp32"), with_onnx="fp16")[0].bundle
    return Made(toy, {"fp32": floats.path, "int8": toy_int8.path})


@pytest.fixture
def made(toys: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Let the tests' own toys be what it makes; the shortest generations; no probe."""
    monkeypatch.setattr(room, "_made", lambda folder, size, absent, say: toys)
    monkeypatch.setattr(room, "_diagnosed", lambda device, say: None)
    monkeypatch.setattr(room, "_DURATIONS", {False: (1.0,)})
    monkeypatch.setattr(room, "_REQUEST", replace(room._REQUEST, seconds=1.0, steps=2))
    return toys


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let nothing be timed, and return the engines that would be."""
    names: list[str] = []
    monkeypatch.setattr(room, "bench", lambda contenders, *_, **__: names.extend(c.name for c in contenders) or ())
    return names


def test_all_engines_of_the_toys_pass_on_the_cpu_and_are_measured(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "selftest.json"
    assert cli.run(["selftest", "--json", str(report)]) == 0
    told, data = capsys.readouterr().out, json.loads(report.read_text())
    assert "Self-test on cpu passed: mnn, mnn-int8, onnxruntime-fp16, torch, torch-fp16, onnxruntime" in told
    assert "1 s of audio" in told
    assert max(map(len, told.split("dB against")[1].split("Self-test")[0].splitlines())) <= 80
    golden = {(f["engine"], f["what"]): f["of_peak"] for f in data["golden"]}
    cases = (*(c.value for c in Component), "generation", "its audio", "guided")
    assert golden.keys() == {(engine, case) for engine in ("mnn", "onnxruntime", "torch") for case in cases}
    assert max(golden.values()) < 1e-4
    judged = {(f["engine"], f["what"]): f for f in data["findings"]}
    assert judged.keys() == {(engine, what) for engine in ENGINES for what in (*(c.value for c in Component), LATENTS)}
    assert judged["torch", "decoder"]["db"] > 100
    assert 30 < judged["mnn-int8", "dit"]["db"] < 60
    measured = {(row["engine"], row["temperature"]): row for row in data["rows"]}
    assert {name for name, _ in measured} == {*ENGINES, "onnxruntime"}
    assert all(row["seconds"]["total"] > 0 and row["peak_bytes"] > 1 << 20 for row in measured.values())
    bundle, card = Path(made.bundles["int8"]), tmp_path / "README.md"
    assert cli.run(["bundle", "card", str(bundle), "--selftest", str(report), "-o", str(card)]) == 0
    manifest = json.loads((bundle / MANIFEST).read_text())
    assert untraced(card.read_text(), manifest, data) == []


@pytest.mark.usefixtures("made")
def test_a_device_on_which_no_engine_runs_is_exit_7_with_the_reason_of_each(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available() or has_backend("cuda"):
        pytest.skip("there is a CUDA device")
    report = tmp_path / "selftest.json"
    assert cli.run(["selftest", "--device", "cuda", "--json", str(report)]) == 7
    said = capsys.readouterr().err
    assert said.startswith("Toys on cuda: about two minutes")
    for reason in ("MNN_CUDA=ON", "is built for the CPU", "finds no CUDA device"):
        assert reason in said
    assert not report.exists()


def test_a_wrong_device_is_told_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room, "_without_models", lambda device: dict.fromkeys(room._CANDIDATES, "no driver"))
    with pytest.raises(BackendError, match=r"No engine runs on cuda\. no driver$"):
        selftest("cuda", tmp_path, full=True, say=lambda _: pytest.fail("something was made"))


@pytest.mark.parametrize("full", [False, True])
def test_room_is_asked_for_first(full: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room, "_BYTES", {full: 1 << 60})
    with pytest.raises(UsageError, match="The test needs"):
        selftest("cpu", tmp_path, full=full, say=lambda _: pytest.fail("something was made"))


def tampering(monkeypatch: pytest.MonkeyPatch, component: Component, change: Callable[[Any], Any]) -> None:
    """Let torch's outputs of a component be others."""
    load = TorchEngine.load

    class Tampered:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, feeds: Any) -> Any:
            return {name: change(array) for name, array in self.session.run(feeds).items()}

    def loaded(self: TorchEngine, which: Component) -> Any:
        session = load(self, which)
        return Tampered(session) if which is component else session

    monkeypatch.setattr(TorchEngine, "load", loaded)


@pytest.mark.usefixtures("made", "timed")
def test_an_engine_that_is_wrong_in_one_component_fails_it_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tampering(monkeypatch, Component.DECODER, lambda array: array * 1.01)
    found = selftest("cpu", tmp_path, say=lambda _: None)
    assert [(one.engine, one.what) for one in found.golden if not one.passes] == [
        ("torch", "decoder"),
        ("torch", "its audio"),
    ]
    bad = [finding for finding in found.findings if not finding.passes]
    assert [(finding.engine, finding.what) for finding in bad] == [("torch", "decoder"), ("torch-fp16", "decoder")]
    assert bad[0].db == pytest.approx(40, abs=0.1)
    with pytest.raises(VerificationError, match=r"FAILED in 4 of .*1\.0e-02 of the peak.*torch, decoder: 40\.0 dB"):
        found.check()


@pytest.mark.usefixtures("made", "timed")
def test_an_engine_that_is_wrong_the_second_time_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    turns = iter(range(1 << 20))
    tampering(monkeypatch, Component.ENCODER, lambda array: array * (1.0 if next(turns) % 2 == 0 else 1.01))
    found = selftest("cpu", tmp_path, say=lambda _: None)
    (bad,) = (one for one in found.findings if not one.passes and one.engine == "torch")
    assert bad.db is not None
    assert bad.db > 100
    assert bad.again_db == pytest.approx(40, abs=0.1)


@pytest.mark.usefixtures("made", "timed")
def test_golden_cases_of_other_weights_say_nothing_and_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toys: Made, golden_small: Any
) -> None:
    monkeypatch.setattr(
        room, "_made", lambda folder, size, absent, say: replace(toys, checkpoint=golden_small.checkpoint)
    )
    found = selftest("cpu", tmp_path, say=lambda _: None)
    assert found.golden == ()
    assert any("other numbers of the toy's seed" in failure for failure in found.failures())


@pytest.mark.usefixtures("made")
def test_an_engine_that_fails_is_told_and_not_timed_and_the_others_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timed: list[str]
) -> None:
    def silent(array: Any) -> Any:
        raise BackendError("the device reported nothing and wrote nothing")

    tampering(monkeypatch, Component.DIT, silent)
    found = selftest("cpu", tmp_path, say=lambda _: None)
    assert [one.what for one in found.golden if one.of_peak is None] == ["the rest"]
    assert {(f.engine, f.what) for f in found.findings if f.db is None} == {
        (engine, what) for engine in ("torch", "torch-fp16") for what in ("dit", LATENTS)
    }
    assert "torch, dit: error: the device reported nothing and wrote nothing" in found.failures()
    assert timed == ["mnn", "mnn-int8", "onnxruntime", "onnxruntime-fp16"]


def test_what_cannot_be_converted_leaves_torch_alone(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> None:
        raise BackendError("MNN's Python package cannot be imported.")

    monkeypatch.setattr(room, "convert", absent)
    absent_engines: dict[str, str] = {}
    made = room._made(tmp_path / "models", "toy", absent_engines, lambda _: None)
    assert made.reference().engine == "torch"
    assert absent_engines.keys() == {"mnn", "mnn-int8", "onnxruntime", "onnxruntime-fp16"}
    assert "cannot be imported" in absent_engines["mnn"]


def result(**changed: Any) -> SelfTest:
    fine = Finding("mnn", "dit", 60, 100.0)
    return replace(SelfTest("cuda", False, {}, {"torch": "no"}, (fine,), (), (), None, 1.0), **changed)


def test_a_probe_of_what_models_need_counts_at_the_usual_setting() -> None:
    usual, low = setting_name("high", "normal"), setting_name("high", "low")
    needed = ProbeResult("linear", "a", {usual: Answer("works"), low: Answer("fails")}, needed_by=(Component.DIT,))
    hazard = ProbeResult("round-half", "b", {usual: Answer("wrong", 3.0)}, "round-half-to-even")
    fine = Diagnosis("3.6.1", "cuda", "m", (needed, hazard))
    assert result(diagnosis=fine).verdict() == "Self-test on cuda passed: mnn; not there: torch."
    wrong = replace(needed, answers={usual: Answer("wrong", 3.0)})
    assert result(diagnosis=replace(fine, results=(wrong, hazard))).failures() == (f"doctor, linear: wrong at {usual}",)


@pytest.mark.slow
def test_the_whole_of_it_passes_on_this_machine(tmp_path: Path) -> None:
    report = tmp_path / "selftest.json"
    assert cli.run(["selftest", "--json", str(report)]) == 0
    data = json.loads(report.read_text())
    assert data["diagnosis"]["backend"] == "cpu"
    assert data["failures"] == []
