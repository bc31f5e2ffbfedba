"""`run --device` and `--place`: what is not there is exit 7, never the CPU in silence."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from sa3_convert.mnn.compatibility import has_backend
from sa3_convert.mnn.session import MnnSession


def run(bundle: Bundle, folder: Path, arguments: Sequence[str]) -> int:
    how = ["--prompt", "p", "--seconds", "1", "--steps", "1", "--allow", "silence", "--allow", "clipping"]
    return cli.run(["run", str(bundle.path), *how, "-o", str(folder / "out.wav"), *arguments])


@pytest.mark.parametrize(
    "arguments", [["--engine", "mnn", "--device", "cuda"], ["--backend", "cuda"], ["--place", "text_encoder=cuda"]]
)
def test_mnn_without_cuda_is_exit_7_and_says_how_to_get_one(
    toy_fp32: Bundle, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if has_backend("cuda"):
        pytest.skip("this MNN has CUDA")
    assert run(toy_fp32, tmp_path, arguments) == 7
    assert "MNN_CUDA=ON" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_onnxruntime_without_cuda_is_exit_7(
    toy_fp32: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    assert run(toy_fp32, tmp_path, ["--engine", "onnxruntime", "--device", "cuda"]) == 7
    assert "sa3-convert[cuda]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_torch_without_cuda_is_exit_7(
    toy_fp32: Bundle, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch finds a CUDA device")
    assert run(toy_fp32, tmp_path, ["--engine", "torch", "--checkpoint", str(toy), "--device", "cuda"]) == 7
    assert "finds no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--engine", "onnxruntime", "--device", "vulkan"],
        ["--engine", "onnxruntime", "--place", "dit=cpu"],
        ["--place", "piano=cpu"],
        ["--device", "abacus"],
    ],
)
def test_what_makes_no_sense_is_exit_2(toy_fp32: Bundle, tmp_path: Path, arguments: list[str]) -> None:
    assert run(toy_fp32, tmp_path, arguments) == 2


def test_a_placement_is_told_and_generates(
    toy_fp32: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(toy_fp32, tmp_path, ["--place", "text_encoder=cpu"]) == 0
    assert "text_encoder on cpu: placed with --place" in capsys.readouterr().err


class Dead:
    """MNN's interpreter on a device that computes nothing and reports success."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter

    def __getattr__(self, name: str) -> Any:
        return (lambda session: 0) if name == "runSession" else getattr(self._interpreter, name)


def test_a_device_that_computes_nothing_is_exit_7_and_no_silence(
    toy_fp32: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = MnnSession._load

    def dead(self: MnnSession, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        interpreter, session = load(self, *arguments, **options)
        return Dead(interpreter), session

    for room in ("sa3_convert.cli.generate", "sa3_convert.mnn.session"):
        monkeypatch.setattr(f"{room}.require_backend", lambda backend: None)
    monkeypatch.setattr(MnnSession, "backend_in_use", "opencl")
    assert run(toy_fp32, tmp_path, ["--device", "opencl"]) == 0
    (tmp_path / "out.wav").unlink()
    capsys.readouterr()
    monkeypatch.setattr(MnnSession, "_load", dead)
    assert run(toy_fp32, tmp_path, ["--device", "opencl"]) == 7
    assert "the device reported nothing and wrote nothing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_engine_for_a_device_is_told_with_its_reason(
    toy_fp32: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sa3_convert.runtime.placement.onnxruntime_problem", lambda: None)
    # It goes on to the engine that was chosen, which then says what this machine lacks.
    assert run(toy_fp32, tmp_path, ["--device", "cuda"]) == 7
    said = capsys.readouterr().err
    assert "Engine onnxruntime on cuda: this MNN has no CUDA, this ONNX Runtime has." in said
    assert "ONNX Runtime has no CUDA here" in said


def test_what_only_mnn_has_asks_for_mnn(
    toy_fp32: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sa3_convert.runtime.placement.onnxruntime_problem", lambda: None)
    assert run(toy_fp32, tmp_path, ["--device", "cuda", "--memory", "low"]) == 7
    assert "Engine mnn on cuda: only it has the setting memory." in capsys.readouterr().err
