import json
from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle

QUICK = ["--seconds", "0.5,1", "--repeats", "1", "--steps", "1", "--threads", "1"]


def test_the_table_is_printed_and_its_figures_are_written(
    toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    assert cli.run(["bench", str(toy_int8.path), *QUICK, "--engine", "mnn", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    data = json.loads(file.read_text())
    assert data["machine"]["processor"] in out
    assert [(row["duration"], row["temperature"]) for row in data["rows"]] == [
        (0.5, "cold"),
        (0.5, "warm"),
        (1.0, "cold"),
        (1.0, "warm"),
    ]
    for row in data["rows"]:
        assert f"{row['seconds']['total']:.3f}" in out
        assert f"{row['peak_bytes'] / 2**20:.0f}" in out
    assert data["engines"] == {"mnn": {"engine": "mnn", "threads": 1}}


def test_memory_is_measured_only_if_wanted(toy_int8: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    arguments = ["bench", str(toy_int8.path), *QUICK, "--engine", "mnn-low", "--no-memory", "--json", str(file)]
    assert cli.run(arguments) == 0
    assert {row["peak_bytes"] for row in json.loads(file.read_text())["rows"]} == {None}


def test_the_engine_that_run_takes_is_measured_when_none_is_named(
    toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    assert cli.run(["bench", str(toy_int8.path), *QUICK, "--no-memory", "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    assert data["engines"] == {"mnn": {"engine": "mnn", "threads": 1}}
    assert f"Engine mnn on cpu: {data['chosen']}." in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seconds", "ten"],
        ["--seconds", ""],
        ["--seconds", "1,-1"],
        ["--seconds", "nan"],
        ["--seconds", "1e9"],
        ["--repeats", "0"],
        ["--engine", "cuda"],
        ["--engine", "torch"],
    ],
)
def test_what_cannot_be_measured_is_exit_2(
    toy_int8: Bundle, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", str(toy_int8.path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
