"""`convert` on workers, as a user gives it: the bundle is that of one process."""

import json
from pathlib import Path
from typing import Any

import pytest

import sa3_convert.cli.app as cli

SOME = ("--component", "number_conditioner", "--component", "decoder", "--no-ort-int8", "--threads", "1")


def convert(checkpoint: Path, out: Path, *arguments: str) -> int:
    return cli.run(["convert", str(checkpoint), "--out", str(out), *SOME, *arguments])


def models(out: Path) -> dict[str, Any]:
    manifest = json.loads((out / "manifest.json").read_text())
    return {artifact["path"]: artifact for artifact in manifest["artifacts"]}


def test_workers_make_the_bundle_that_this_process_makes(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("distributed")
    assert convert(toy, tmp_path / "here", "--cache", str(tmp_path / "cache-here")) == 0
    capsys.readouterr()
    assert convert(toy, tmp_path / "there", "--cache", str(tmp_path / "cache-there"), "--workers", "2") == 0
    told = capsys.readouterr().err
    here, there = (models(tmp_path / name) for name in ("here", "there"))
    assert here.keys() == there.keys()
    for path, artifact in here.items():
        assert there[path]["sha256"] == artifact["sha256"], path
        assert there[path]["fidelity"] == artifact["fidelity"], path
    # Everything was there when this process came to it.
    lines = [line.split() for line in told.splitlines() if line.startswith(("decoder", "number_conditioner"))]
    done = [(component, stage) for component, stage, time, *_ in lines if time != "unchanged" and stage != "exporting"]
    unchanged = [(component, stage) for component, stage, time, *_ in lines if time == "unchanged"]
    assert sorted(done) == sorted(unchanged)
    assert {component for component, _ in done} == {"decoder", "number_conditioner"}


def test_a_stage_that_fails_on_a_worker_ends_the_conversion_with_its_error(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("distributed")
    recipe = tmp_path / "strict.yaml"
    decoder = {"weights": {"bits": 8}, "floor_db": 120}
    recipe.write_text(
        json.dumps({"schema": 1, "name": "strict", "description": "Out of reach.", "components": {"decoder": decoder}})
    )
    arguments = ("--recipe", str(recipe), "--component", "decoder", "--no-ort-int8", "--workers", "2")
    assert cli.run(["convert", str(toy), "--out", str(tmp_path / "out"), *arguments]) == 5
    assert "the floor is 120" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_force_and_workers_are_refused_together(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("distributed")
    assert convert(toy, tmp_path / "out", "--force", "--workers", "2") == 2
    assert "--force" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
