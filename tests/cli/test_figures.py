"""`--json` in every spelling, what is said and what is kept quiet, and lines that come as they are printed."""

import json
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.table import Peer
from sa3_convert.cli import console
from sa3_convert.cli.bench import bench_table
from sa3_convert.cli.options import listed, write_figures
from sa3_convert.errors import InputError, UsageError
from sa3_convert.lab.bench import Figures, Row
from tests.passes.graphs import checked, graph

LINEAR = "(float[1, N, 64] x) => (float[1, N, 64] y) { h = MatMul(x, w)  y = Tanh(h) }"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    onnx.save(checked(graph(LINEAR, w=weight)), folder / "graph.onnx")
    made = folder / "graph.mnn"
    arguments = ["--component", "decoder", "--recipe", "fp32", "--out", str(made)]
    assert cli.run(["mnn", str(folder / "graph.onnx"), *arguments]) == 0
    return made


def test_json_has_one_meaning_in_every_spelling(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert cli.run(["inspect", str(model), "--json", str(file)]) == 0
    assert "64×64" in capfd.readouterr().out
    data = json.loads(file.read_text())
    assert data["schema"] == 1
    assert data["file"] == str(model)
    capfd.readouterr()
    for arguments in (
        [str(model), "--json"],
        ["--json", str(model)],
        [str(model), "--json", "-"],
        ["--json=-", str(model)],
    ):
        assert cli.run(["inspect", *arguments]) == 0
        captured = capfd.readouterr()
        assert json.loads(captured.out) == data
        assert "fp32" in captured.err


def test_a_table_is_printed_without_json(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(model)]) == 0
    captured = capfd.readouterr()
    assert "64×64" in captured.out
    assert captured.err == ""


def test_a_quiet_command_says_nothing_on_standard_error(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--quiet", "inspect", str(model), "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["schema"] == 1
    assert captured.err == ""
    assert cli.run(["-q", "inspect", str(model.with_name("no.mnn"))]) == 3
    assert "no.mnn" in capfd.readouterr().err
    assert cli.run(["inspect", str(model), "--json"]) == 0
    assert capfd.readouterr().err, "a quiet command has no effect on the next one"


def test_quiet_and_verbose_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["-q", "-v", "inspect", "x.mnn"]) == 2
    assert "contradict" in capsys.readouterr().err


def test_what_is_inspected_is_not_written_over(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.read_bytes()
    assert cli.run(["inspect", str(model), "--json", str(model)]) == 2
    assert "what is read" in capsys.readouterr().err
    assert model.read_bytes() == before


def test_a_plan_of_a_conversion_is_a_table_and_figures_and_shows_the_recipe(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["convert", str(toy), "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    captured = capfd.readouterr()
    data = json.loads(captured.out)
    assert (data["schema"], data["up_to_date"]) == (1, False)
    assert {row["component"] for row in data["components"]} >= {"dit", "decoder", "text_encoder"}
    for row in data["components"]:
        assert row["model_bytes"] > 0
        assert row["component"] in captured.err
        assert "mnn" in row["to_do"]
    assert "name: int8" in captured.err
    assert not (tmp_path / "out").exists()


def test_what_would_be_measured_is_told_as_figures_too(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(toy), "--component", "dit", "--target-mib", "1", "--out", str(tmp_path / "r.yaml")]
    assert cli.run([*arguments, "--dry-run", "--json"]) == 0
    captured = capfd.readouterr()
    data = json.loads(captured.out)
    assert f"dit: {len(data['layers'])} layers would be measured in {data['passes']} backward passes." in captured.err
    assert data["component"] == "dit"
    assert not (tmp_path / "r.yaml").exists()


@pytest.mark.parametrize("target", [[], ["--target-mib", "1", "--min-snr", "3"], ["--min-snr", "inf"]])
def test_a_plan_has_one_finite_goal(target: list[str], toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", str(toy), "--component", "dit", "--out", "r.yaml", *target]) == 2
    assert "--min-snr" in capsys.readouterr().err


def test_figures_are_json_and_utf8_whatever_names_hold(tmp_path: Path) -> None:
    names = {"name": "日本\ud800\x9b"}
    write_figures(tmp_path / "a.json", names)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"schema": 1, **names}
    assert "日本" in (tmp_path / "a.json").read_text(encoding="utf-8")
    write_figures(None, names)


@pytest.mark.parametrize("text", ["", "ten", "1,,2", "0", "-1", "nan"])
def test_a_list_of_numbers_is_one(text: str) -> None:
    assert listed("--seconds", "2,1,2", float, (5.0,), lambda s: s > 0) == (2, 1)
    assert listed("--seconds", None, float, (5.0,), lambda s: s > 0) == (5,)
    with pytest.raises(UsageError, match=r"--seconds .* is no list .* for example 5"):
        listed("--seconds", text, float, (5.0,), lambda s: s > 0)


def printed(what: Any) -> list[str]:
    shown = console.EscapingConsole(file=StringIO(), width=80)
    shown.print(what)
    assert isinstance(shown.file, StringIO)
    return [line.rstrip() for line in shown.file.getvalue().splitlines() if line.strip()]


def test_measurements_fit_80_columns_and_have_their_digits() -> None:
    slow = Figures(12.3456, 1.23456, 0.001, 4567.8, 345.678, 1.5, 8)
    rows = [Row("onnxruntime-int8", 120.0, "cold", slow, (slow.total,), 12345 << 20)]
    title, heads, _, row = printed(bench_table(rows, "120 s of audio"))
    assert title == "120 s of audio"
    assert heads.split() == ["engine", "load", "T5", "step", "DiT", "decoder", "other", "total", "×time", "MiB"]
    assert row.split() == [
        "onnxruntime-int8", "cold", "12.35", "1.235", "571.0", "4567.8", "345.7", "1.501", "4928.6", "0.02", "12345",
    ]  # fmt: skip


def test_a_peers_times_stand_beside_ours_and_what_it_did_not_tell_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "peer.json"
    row = {"duration": 10, "text_encoder": 0.5, "dit": 20, "decoder": 4.5, "peak_bytes": 528 << 20}
    file.write_text(json.dumps({"name": "other", "machine": "two cores", "rows": [row]}))
    peer = Peer.read(file)
    *_, told = printed(bench_table([], "10 s of audio", [(peer.name, peer.rows[0])]))
    assert told.split() == ["other", "peer", "0.500", "20.00", "4.500", "25.00", "0.40", "528"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": []},
        {"rows": [{"duration": 10}]},
        {"rows": [{"duration": 10, "total": -1}]},
        {"rows": [{"duration": 10, "totle": 1}]},
        {"name": "a name with a \x1b"},
        {"more": 1},
    ],
)
def test_what_no_peer_can_have_measured_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    file = tmp_path / "peer.json"
    file.write_text(json.dumps({"name": "other", "machine": "m", "rows": [{"duration": 10, "total": 1}]} | wrong))
    with pytest.raises(InputError, match=r"peer.json is no file of a peer's times"):
        Peer.read(file)


def test_work_is_told_in_lines_now_and_then_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_EVERY", 0.0)
    with console.progress("starting") as tick:
        tick("denoising", 1, 4)
        tick("reading", 0, None)
    assert capsys.readouterr().err.splitlines() == ["denoising: 25%", "reading …"]
    monkeypatch.setattr(console, "_EVERY", 60.0)
    with console.progress("starting") as tick:
        tick("denoising", 1, 4)
    assert capsys.readouterr().err == ""


def test_a_line_reaches_a_pipe_as_it_is_printed() -> None:
    program = (
        "import time; from sa3_convert.system.streams import prepare_standard_streams\n"
        "prepare_standard_streams(); print('begun'); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as running:
        began = time.monotonic()
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        assert time.monotonic() - began < 50
        running.kill()
