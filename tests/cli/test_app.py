"""The command line's contract: names, exit codes, one paragraph per error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert import errors
from sa3_convert.cli.console import stderr, stdout

HEAVY = ("torch", "MNN", "_tools", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "transformers")

BLOCKED = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Blocker())
from sa3_convert.cli import main
main(sys.argv[1:])
"""


def run_blocked(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["convert", "--help"],
        ["run", "--help"],
        ["verify", "--help"],
        ["inspect", "--help"],
        ["doctor", "--help"],
        ["checkpoint", "synthesize", "--help"],
        ["bundle", "export", "--help"],
    ],
)
def test_help_works_with_no_heavy_package_installed(arguments: list[str]) -> None:
    result = run_blocked(*arguments)
    assert result.returncode == 0, result.stderr
    assert "sa3-convert" in result.stdout


def test_the_command_line_is_there_without_what_only_commands_need() -> None:
    late = {"pydantic", "yaml", "numpy", "rich", "ctypes", "tempfile"}
    program = f"import sys, sa3_convert.cli.app; print(*{late} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["convert", "CHECKPOINT", "--out", "OUT"], "convert"),
        (["export", "CHECKPOINT", "--component", "dit", "--out", "OUT.onnx"], "convert"),
        (["fuse", "X.onnx", "--component", "dit", "--out", "OUT.onnx"], "check"),
        (["sweep", "CHECKPOINT", "--recipe", "int8", "--out", "OUT"], "convert"),
    ],
)
def test_what_a_command_needs_is_named_where_only_running_was_installed(
    arguments: list[str], extra: str, toy: Path, tmp_path: Path
) -> None:
    places = {"CHECKPOINT": str(toy), "OUT": str(tmp_path / "out"), "OUT.onnx": str(tmp_path / "out.onnx")}
    done = run_blocked(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 7, done.stderr
    assert re.search(rf"pip install .*\[{extra}\]", done.stderr)
    assert "bug" not in done.stderr


def test_a_module_of_our_own_that_is_missing_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sa3_convert.mnn.file.storage", None)
    assert cli.run(["inspect", str(tmp_path / "x.mnn")]) == 70
    assert "bug" in capsys.readouterr().err


def test_a_wrong_flag_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert", "--nonsense"]) == 2
    assert "No such option" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["convert"], ["run"], ["nonsense"], ["checkpoint"], ["bundle", "export"]])
def test_missing_or_unknown_arguments_are_exit_2(arguments: list[str]) -> None:
    assert cli.run(arguments) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError, 2),
        (errors.CheckpointError, 3),
        (errors.RecipeError, 3),
        (errors.BundleError, 3),
        (errors.AudioError, 3),
        (errors.ModelFileError, 3),
        (errors.ConversionError, 4),
        (errors.VerificationError, 5),
        (errors.DriftError, 6),
        (errors.BackendError, 7),
        (errors.OutputRejectedError, 8),
        (ZeroDivisionError, 70),
    ],
)
def test_each_error_has_its_exit_code_and_no_traceback(
    error: type[BaseException],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("what, where, and what to do")

    monkeypatch.setattr(cli, "app", fail)
    assert cli.run(["inspect", "x"]) == code
    captured = capsys.readouterr()
    assert captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_an_interrupt_is_130_and_left_to_the_parent_to_tell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    assert cli.run(["inspect", "x"]) == 130
    assert capsys.readouterr() == ("", "")


def test_debug_adds_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--debug", "verify", str(tmp_path)]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_checkpoint_is_exit_3_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 3
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Path(__file__).parents[1] / "golden" / "small" / "checkpoint"
    arguments = ["convert", str(checkpoint), "--recipe", str(tmp_path / "no.yaml"), "--out", str(tmp_path / "out")]
    assert cli.run(arguments) == 3
    assert "own are balanced" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(tmp_path)]) == 3
    assert "is no bundle" in capsys.readouterr().err


def run_with(arguments: list[str], cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "sa3_convert", *arguments]
    here = str(Path(cli.__file__).parents[2])
    return subprocess.run(
        command, capture_output=True, check=False, cwd=cwd, env={**os.environ, "PYTHONPATH": here, **environment}
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", os.fsdecode(b"\xff"), "--prompt", "x", "-o", "x.wav"],
        ["run", "bundle", "--prompt", os.fsdecode(b"\xff"), "-o", "x.wav"],
        ["run", "bundle", "--prompt", "x", "-o", os.fsdecode(b"\xff.wav")],
        ["inspect", os.fsdecode(b"\xff.mnn")],
        ["convert", "checkpoint", "--out", os.fsdecode(b"\xff")],
        ["bundle", "export", "bundle", "--to", os.fsdecode(b"\xff")],
    ],
)
def test_an_argument_that_is_not_utf8_is_exit_2(arguments: list[str], tmp_path: Path) -> None:
    done = run_with(arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert b"udcff" in done.stderr
    assert b"is not UTF-8. Rename" in done.stderr


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_a_terminal_of_another_encoding_is_no_bug(environment: dict[str, str], tmp_path: Path, toy: Path) -> None:
    done = run_with(["inspect", "日本🎷.mnn"], **environment)
    assert done.returncode == 3, done.stderr
    (tmp_path / "é").symlink_to(toy)
    done = run_with(["convert", str(tmp_path / "é"), "--out", "日本", "--dry-run"], **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_brackets_in_what_is_shown_are_no_markup() -> None:
    """A recipe's rule `[qk]_proj$` was shown as `_proj$`."""
    for console in (stdout, stderr):
        assert console.render_str("match: '[qk]_proj$'").plain == "match: '[qk]_proj$'"
