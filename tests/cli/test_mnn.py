"""`mnn` on graphs that nobody exported here."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sa3_convert.cli import app as cli
from sa3_convert.passes import hazards
from tests.passes.graphs import checked, graph

WEIGHT = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
LINEAR = "(float[1, N, 64] x) => (float[1, N, 64] y) { h = MatMul(x, w)  y = Tanh(h) }"


def written(folder: Path, text: str, **constants: Any) -> Path:
    path = folder / "graph.onnx"
    onnx.save(checked(graph(text, **constants)), path)
    return path


def mnn(source: Path, *options: str, recipe: str = "fp32") -> int:
    target = source.with_suffix(".mnn")
    return cli.run(["mnn", str(source), "--component", "decoder", "--recipe", recipe, "--out", str(target), *options])


def test_a_sound_graph_is_compared_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path, LINEAR, w=WEIGHT)
    assert mnn(source) == 0
    assert source.with_suffix(".mnn").exists()
    assert " dB" in capsys.readouterr().out


def test_a_hazard_is_refused_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path, "(float[1, N, 64] x) => (float[1, N, 64] y) { y = Round(x) }")
    assert mnn(source) == 4
    assert "round-half-to-even" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]


@pytest.mark.parametrize(
    "text",
    [
        "(float[1, N, 64] x) => (bool[1, N, 64] y) { y = Less(x, row) }",
        "(float[64, 8] x) => (float[8, 64] y) { y = Gemm<transA = 1>(x, w) }",
        "(float[1, N, 64] x) => (float[1, N, 64] y) { c = Greater(x, zero)  y = Where(c, x, row) }",
    ],
)
def test_what_mnn_computes_wrongly_is_kept_back_without_the_lint_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(hazards, "refuse_hazards", lambda *_, **__: None)
    constants = {"w": WEIGHT, "row": WEIGHT[0], "zero": np.float32(0)}
    source = written(tmp_path, text, **{name: array for name, array in constants.items() if f", {name})" in text})
    assert mnn(source) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]


def test_below_the_floor_nothing_takes_the_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path, LINEAR, w=WEIGHT)
    source.with_suffix(".mnn").write_bytes(b"what was there")
    assert mnn(source, "--floor-db", "90", recipe="int8") == 5
    assert "the floor is 90 dB" in capsys.readouterr().err
    assert source.with_suffix(".mnn").read_bytes() == b"what was there"
    assert mnn(source, recipe="int8") == 0


def test_inputs_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path, "(float[1, N, 64] x) => (float[1, N, 64] y) { y = Sqrt(x) }")
    assert mnn(source) == 5
    assert "NaN" in capsys.readouterr().err
    np.savez(tmp_path / "inputs.npz", x=np.abs(WEIGHT[None, :7]))
    assert mnn(source, "--input", str(tmp_path / "inputs.npz")) == 0


@pytest.mark.parametrize("feeds", [{"z": WEIGHT[None]}, {"x": WEIGHT}, {"x": WEIGHT[None].astype(np.int32)}])
def test_inputs_that_are_not_the_graphs_are_an_input_error(tmp_path: Path, feeds: dict[str, Any]) -> None:
    source = written(tmp_path, LINEAR, w=WEIGHT)
    np.savez(tmp_path / "inputs.npz", **feeds)
    assert mnn(source, "--input", str(tmp_path / "inputs.npz")) == 3
    assert not source.with_suffix(".mnn").exists()


TEXT_ENDINGS = ("json", "textproto", "onnxtxt")
"""For which the ONNX library reads and writes text."""


@pytest.mark.parametrize("command", ["mnn", "fuse"])
@pytest.mark.parametrize("ending", ["onnx", *TEXT_ENDINGS])
def test_what_is_no_onnx_is_an_input_error_whatever_its_name_ends_with(
    command: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / f"model.{ending}"
    source.write_text('{"not": "a model"}')
    options = ["--component", "dit", "--recipe", "int8", "--out", str(tmp_path / "out")]
    assert cli.run([command, str(source), *options]) == 3
    assert source.name in capsys.readouterr().err


@pytest.mark.parametrize("ending", TEXT_ENDINGS)
def test_a_graph_is_written_and_read_as_onnx_whatever_its_name_ends_with(ending: str, tmp_path: Path) -> None:
    source, fused = written(tmp_path, LINEAR, w=WEIGHT), tmp_path / f"fused.{ending}"
    options = ["--component", "decoder", "--recipe", "fp32", "--out"]
    assert cli.run(["fuse", str(source), *options, str(fused)]) == 0
    assert onnx.load(fused, format="protobuf").graph.output[0].name == "y"
    assert mnn(fused) == 0
