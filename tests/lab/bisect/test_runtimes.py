"""One file run in two ways: what differs is charged to the operator that makes the difference."""

import json
from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component
from sa3_convert.errors import BackendError, UsageError
from sa3_convert.lab.bisect.bisect import bisect_bundle_against
from sa3_convert.lab.bisect.runtimes import Difference, Runtime
from sa3_convert.mnn.compatibility import has_backend

TEXT = Component.TEXT_ENCODER


def test_another_number_of_threads_changes_nothing_but_rounding(toy_int8: Bundle) -> None:
    found = bisect_bundle_against(toy_int8, TEXT, Runtime(threads=2), Runtime(threads=1))
    assert found.suspect is None, found.verdict()
    assert len(found.differences) > 50
    assert "no operator differs" in found.verdict()


def test_quantised_activations_are_charged_to_the_first_linear(toy_int8: Bundle) -> None:
    found = bisect_bundle_against(toy_int8, TEXT, Runtime(memory="low"), Runtime())
    suspect = found.suspect
    assert suspect is not None
    assert suspect.stored == "int8"
    assert suspect.operator.startswith("Convolution")
    before = found.differences[: found.differences.index(suspect)]
    assert all(d.out_db > 80 for d in before)


def test_float_weights_know_no_memory_mode(toy_fp32: Bundle) -> None:
    found = bisect_bundle_against(toy_fp32, TEXT, Runtime(memory="low"), Runtime())
    assert found.suspect is None, found.verdict()


def test_an_error_that_only_travels_is_charged_to_nobody() -> None:
    assert not Difference("y", "BinaryOp", "fp32", (1,), in_db=30, out_db=25).is_charged
    assert Difference("y", "BinaryOp", "fp32", (1,), in_db=60, out_db=25).is_charged
    assert not Difference("y", "BinaryOp", "fp32", (1,), in_db=300, out_db=100).is_charged


@pytest.mark.parametrize(
    ("text", "runtime"),
    [
        ("cpu", Runtime()),
        ("cuda", Runtime("cuda")),
        ("cpu,memory=low,threads=1", Runtime(memory="low", threads=1)),
        ("opencl,precision=normal", Runtime("opencl", precision="normal")),
    ],
)
def test_a_runtime_is_read(text: str, runtime: Runtime) -> None:
    assert Runtime.parse(text) == runtime


@pytest.mark.parametrize("text", ["", "abacus", "cpu,", "cpu,memory", "cpu,memory=big", "cpu,threads=0", "cpu,x=1"])
def test_what_is_no_runtime_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="memory=LEVEL"):
        Runtime.parse(text)


def test_the_same_on_both_sides_is_refused(toy_int8: Bundle) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        bisect_bundle_against(toy_int8, TEXT, Runtime(), Runtime())


def test_a_backend_that_is_not_there_is_told(toy_int8: Bundle) -> None:
    if has_backend("cuda"):
        pytest.skip("this MNN has CUDA")
    with pytest.raises(BackendError):
        bisect_bundle_against(toy_int8, TEXT, Runtime("cuda"), Runtime())


def test_the_command_prints_and_writes(toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--component", "text_encoder", "--against", "cpu,memory=low", "--json", str(tmp_path / "out.json")]
    assert cli.run(["bisect", str(toy_int8.path), *arguments]) == 0
    assert "is the first that differs" in " ".join(capsys.readouterr().out.split())
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["suspect"] in {operator["name"] for operator in data["operators"]}
    assert cli.run(["bisect", str(toy_int8.path), "--component", "dit", "--against", "abacus"]) == 2


def test_verify_runs_models_as_it_is_told(toy_int8: Bundle, tmp_path: Path) -> None:
    found = {}
    for memory in ("normal", "low"):
        file = tmp_path / f"{memory}.json"
        arguments = ["--quick", "--component", "text_encoder", "--memory", memory, "--json", str(file)]
        assert cli.run(["verify", str(toy_int8.path), *arguments]) in (0, 5)
        (found[memory],) = json.loads(file.read_text())["components"]
    assert found["low"]["claimed_db"] is None
    assert found["normal"]["claimed_db"] is not None
    assert found["low"]["worst"] != found["normal"]["worst"]


def test_verify_at_precision_low_says_what_runs_at_normal_as_run_does(
    toy_int8: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(toy_int8.path), "--quick", "--component", "number_conditioner"]
    assert cli.run([*arguments, "--precision", "low"]) == 0
    said = capsys.readouterr()
    assert "at normal instead: number_conditioner, dit." in said.err
    assert "0.5" in said.out
    assert cli.run(arguments) == 0
    assert "instead" not in capsys.readouterr().err


def test_verify_on_a_backend_that_is_not_there_is_exit_7(toy_int8: Bundle) -> None:
    if has_backend("cuda"):
        pytest.skip("this MNN has CUDA")
    assert cli.run(["verify", str(toy_int8.path), "--quick", "--component", "dit", "--backend", "cuda"]) == 7
    assert cli.run(["verify", str(toy_int8.path), "--full", "--backend", "cuda"]) == 2
