"""The README's commands are those that exist, and its first one is run as a newcomer runs it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import typer.main

from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def existing_commands() -> set[str]:
    group = typer.main.get_command(app)
    found = set()
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        found |= {f"{name} {inner}" for inner in below} if below else {name}
    return found


def documented_commands() -> set[str]:
    section = README.split("\n## Commands\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    names = {match for row in rows for match in re.findall(r"`(?:sa3-convert )?([a-z ]+?)(?: [A-Z-].*?)?`", row)}
    return {name.strip() for name in names}


def test_every_command_is_documented_and_every_documented_command_exists() -> None:
    assert documented_commands() == existing_commands()


def test_the_two_commands_stand_first_and_are_targets_of_the_makefile() -> None:
    block = README.split("```")[1]
    commands = [line.split("#")[0].strip() for line in block.strip().splitlines()]
    assert commands == ["make convert", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        assert re.search(rf"^{command.removeprefix('make ')}:", makefile, re.MULTILINE)


def test_targets_that_are_not_built_say_so_and_fail() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"@echo \"(\w+) is not built yet\"", makefile):
        result = subprocess.run(["make", target, "-o", ".venv/.ready"], cwd=ROOT, capture_output=True, check=False)
        assert result.returncode != 0


def test_the_python_example_runs_as_it_stands(
    toy_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "small-music-int8").symlink_to(toy_int8.path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    out = capsys.readouterr().out.splitlines()
    assert out[:-1] == [f"step {index} of 8" for index in range(1, 9)]
    assert out[-1].startswith("on mnn in ")
    streamed, rate = soundfile.read(tmp_path / "pad.wav")
    whole = names["piece"].audio.T
    assert (rate, streamed.shape) == (44100, whole.shape)
    np.testing.assert_allclose(streamed, whole, atol=2**-15)


def demo(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sa3_convert.cli.demo", "--variants", "small-music", "--recipes", "int8"]
    return subprocess.run(
        [*command, "--folder", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )


def test_the_first_command_makes_a_verified_bundle_and_a_wav_and_the_second_time_nothing(tmp_path: Path) -> None:
    first = demo(tmp_path)
    assert first.returncode == 0, first.stderr
    Bundle.open(tmp_path / "toy-small-music-int8").check(kinds=("mnn", "onnx"))
    audio, rate = soundfile.read(tmp_path / "toy-small-music-int8.wav")
    assert rate == 44100
    assert audio.shape == (3 * 44100, 2)
    assert audio.std() > 0.001
    assert "make convert CHECKPOINT=" in first.stdout

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    second = demo(tmp_path)
    assert second.returncode == 0, second.stderr
    assert "up to date; nothing was done" in second.stdout
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {p for p in after if not p.name.startswith(".")} == {p for p in before if not p.name.startswith(".")}
    assert all(after[path] == before[path] for path in before if path.name != ".lock")
