"""`doctor` from the command line: its verdict, its table, its JSON and its errors."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.components import Component
from sa3_convert.errors import BackendError
from sa3_convert.lab.doctor import examine as room
from sa3_convert.lab.doctor import results as store
from sa3_convert.lab.doctor.examine import examine, surroundings
from sa3_convert.lab.doctor.probes import PROBES
from sa3_convert.lab.doctor.records import RECORDS
from sa3_convert.lab.doctor.results import Answer, Diagnosis, ProbeResult, setting_name
from sa3_convert.mnn.compatibility import has_backend
from sa3_convert.system.machine import architecture, version_of

HIGH, LOW = setting_name("high", "normal"), setting_name("low", "normal")
RIGHT = ProbeResult("conv", "a convolution", {HIGH: Answer("works", 130.0)}, None, "", (Component.DECODER,))
AVOIDED = ProbeResult(
    "round", "halves", {HIGH: Answer("wrong", 4.25, "y")}, "round-half-to-even", "refused by the lint"
)
NEEDED = replace(RIGHT, answers={HIGH: Answer("works", 130.0), LOW: Answer("fails", None, "killed by signal 11")})
RECORDED = {"round": "wrong"}


def diagnosis(*results: ProbeResult, **changed: Any) -> Diagnosis:
    made = Diagnosis(version_of("MNN"), "cpu", store.this_machine(), results, 12.4, surroundings())
    return replace(made, **changed)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(RECORDS, (version_of("MNN"), "cpu", architecture()), RECORDED)  # type: ignore[misc]


Said = Callable[..., list[str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Return a function that gives the lines of `doctor` with these options when this is found."""

    def run(found: Diagnosis, *options: str) -> list[str]:
        monkeypatch.setattr(room, "diagnose", lambda backend, report: found)
        assert cli.run(["doctor", *options]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_the_verdict_is_the_first_line_and_no_table_follows(said: Said) -> None:
    lines = said(diagnosis(RIGHT, AVOIDED))
    assert lines[0] == f"MNN {version_of('MNN')} on cpu: everything that the converted models need works."
    assert lines[1] == "2 probes in 12 s: 1 work, 1 do not."
    assert not any("round" in line for line in lines)
    assert "`--probes` lists what does not work and what is done about it." in lines


def test_what_is_needed_and_wrong_is_named_at_once_with_who_needs_it_and_where(said: Said) -> None:
    lines = said(diagnosis(NEEDED, AVOIDED))
    assert lines[0].endswith("not everything that the converted models need works.")
    assert lines[1] == f"  conv: fails; at {LOW}: killed by signal 11 (needed by decoder)"
    assert lines[2] == "2 probes in 12 s: 0 work, 2 do not."


def test_what_is_installed_and_present_follows_the_verdict(said: Said) -> None:
    lines = said(diagnosis(RIGHT, AVOIDED))
    assert f"MNN {version_of('MNN')}" in lines[3]
    assert any("cores" in line for line in lines)
    assert any(line.startswith("MNN: has cpu") for line in lines)
    assert any("CPUExecutionProvider" in line for line in lines)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"mnn_backends": None}, "MNN: not installed"),
        ({"mnn_backends": {"cpu": True, "cuda": True}}, "MNN: has cpu, cuda"),
        ({"onnxruntime_providers": None}, "ONNX Runtime: not installed"),
        ({"torch_cuda": None}, "torch: not installed"),
        ({"torch_cuda": {"version": None, "available": False}}, "torch: a build without CUDA"),
        ({"torch_cuda": {"version": "12.6", "available": False}}, "torch: CUDA 12.6, no device"),
        ({"cuda_driver": "T4 (compute capability 7.5)"}, "CUDA: T4 (compute capability 7.5)"),
        ({"gpus": []}, "NVIDIA GPUs: none that NVML tells of"),
        (
            {"gpus": [{"name": "L4", "memory_bytes": 24 << 30, "driver": "570"}]},
            "NVIDIA GPUs: L4 (24 GiB, driver 570)",
        ),
    ],
)
def test_what_is_missing_is_said_in_words(said: Said, changed: dict[str, Any], line: str) -> None:
    assert line in said(diagnosis(RIGHT, surroundings=surroundings() | changed))


def test_the_same_defects_as_recorded_are_not_worth_a_line(said: Said) -> None:
    assert not any("recorded" in line for line in said(diagnosis(RIGHT, AVOIDED)))


def test_what_changed_against_the_record_is_told(said: Said) -> None:
    assert any("new: conv fails" in line for line in said(diagnosis(NEEDED, AVOIDED)))
    repaired = replace(AVOIDED, answers={HIGH: Answer("works", 120.0)})
    assert any("right now: round" in line for line in said(diagnosis(RIGHT, repaired)))
    assert f"Nothing is recorded yet for MNN on vulkan of {architecture()}." in said(diagnosis(RIGHT, backend="vulkan"))


def test_probes_lists_what_does_not_work_with_its_ratio_and_what_is_done(said: Said) -> None:
    lines = said(diagnosis(RIGHT, AVOIDED), "--probes")
    (row,) = [line for line in lines if "round" in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        "round",
        "halves: y",
        "wrong",
        "4.2",
        "refused by the lint",
    ]
    assert not any("a convolution" in line for line in lines)
    assert not any("--probes" in line for line in lines)


def test_probes_says_who_needs_what_nothing_is_done_about(said: Said) -> None:
    assert any("nothing: decoder need it" in line for line in said(diagnosis(NEEDED), "--probes"))


def test_all_lists_what_works_too(said: Said) -> None:
    lines = said(diagnosis(RIGHT, AVOIDED), "--all")
    assert any("a convolution" in line and "130.0" in line for line in lines)
    assert any("halves" in line for line in lines)


def test_brackets_of_what_mnn_said_are_no_markup(said: Said) -> None:
    odd = replace(AVOIDED, answers={HIGH: Answer("fails", None, "[bold]no[/bold]")})
    assert any("[bold]no[/bold]" in line for line in said(diagnosis(odd), "--probes"))


def test_json_is_the_diagnosis_and_can_be_read_back(said: Said, tmp_path: Path) -> None:
    found = diagnosis(NEEDED, AVOIDED)
    said(found, "--json", str(tmp_path / "doctor.json"))
    data = json.loads((tmp_path / "doctor.json").read_text())
    assert Diagnosis.from_data(data) == found
    assert data["schema"] == store.SCHEMA
    assert data["results"][0]["answers"][LOW] == {"outcome": "fails", "db": None, "detail": "killed by signal 11"}
    assert data["surroundings"]["mnn_backends"]["cpu"] is True


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_diagnosis_is_kept_for_other_commands(said: Said, options: tuple[str, ...]) -> None:
    found = diagnosis(NEEDED, AVOIDED)
    lines = said(found, *options)
    assert store.saved("cpu") == found
    assert options or lines[-1] == f"Kept in {store.diagnosis_path('cpu')}"


def test_the_verdict_is_told_although_it_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(room, "diagnose", lambda backend, report: diagnosis(RIGHT))
    assert cli.run(["doctor"]) == 3
    told = capsys.readouterr()
    assert "everything that the converted models need works" in told.out
    assert str(tmp_path / "file") in told.err


def test_few_probes_are_really_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = tuple(probe for probe in PROBES if probe.id in ("round-half", "rms-norm", "bits-99"))
    monkeypatch.setattr(room, "examine", lambda backend, report: examine(backend, few, report))
    assert cli.run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("everything that the converted models need works.")
    assert ": 1 work, 2 do not." in lines[1]
    kept = store.saved("cpu")
    assert kept is not None
    assert kept.defects() == {"round-half": "wrong", "bits-99": "wrong"}


def test_a_backend_that_is_not_there_is_exit_7(capsys: pytest.CaptureFixture[str]) -> None:
    if has_backend("vulkan"):
        pytest.skip("this MNN has Vulkan")
    assert cli.run(["doctor", "--backend", "vulkan"]) == 7
    told = capsys.readouterr()
    assert "MNN_VULKAN=ON" in told.err
    assert not told.out
    assert store.saved("vulkan") is None


def test_an_mnn_that_is_not_there_is_exit_7(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(backend: str) -> None:
        raise BackendError("MNN's Python package cannot be imported. Install it: pip install MNN.")

    monkeypatch.setattr(room, "require_backend", missing)
    assert cli.run(["doctor", "--json"]) == 7
    told = capsys.readouterr()
    assert "pip install MNN" in told.err
    assert not told.out


@pytest.mark.parametrize("arguments", [("--backend", "abacus"), ("--tables",), ("cpu",)])
def test_what_it_does_not_take_is_exit_2(arguments: tuple[str, ...]) -> None:
    assert cli.run(["doctor", *arguments]) == 2
