"""`doctor` from the command line."""

import json
from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.lab.doctor import examine as room
from sa3_convert.lab.doctor import results as store
from sa3_convert.lab.doctor.examine import examine
from sa3_convert.lab.doctor.probes import PROBES
from sa3_convert.mnn.session import has_backend

FEW = tuple(probe for probe in PROBES if probe.id in ("round-half", "rms-norm", "bits-99"))


@pytest.fixture(autouse=True)
def few_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(room, "examine", lambda backend, report: examine(backend, FEW, report))


def test_it_tells_versions_backends_and_defects_and_keeps_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "MNN: has cpu" in out
    assert "CPUExecutionProvider" in out
    assert "round-half" in out
    assert "rms-norm" not in out.split("MNN 3")[1].split("probes in")[0]
    assert "3 probes" in out
    assert store.saved("cpu") is not None


def test_all_lists_what_works_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--all"]) == 0
    assert "rms-norm" in capsys.readouterr().out


def test_json_is_the_diagnosis(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {result["probe"] for result in data["results"]} == {probe.id for probe in FEW}
    assert data["surroundings"]["mnn_backends"]["cpu"] is True


def test_a_backend_that_is_not_there_is_exit_7(capsys: pytest.CaptureFixture[str]) -> None:
    if has_backend("vulkan"):
        pytest.skip("this MNN has Vulkan")
    assert cli.run(["doctor", "--backend", "vulkan"]) == 7
    assert "MNN_VULKAN=ON" in capsys.readouterr().err
    assert store.saved("vulkan") is None


def test_an_unknown_backend_is_exit_2() -> None:
    assert cli.run(["doctor", "--backend", "abacus"]) == 2
