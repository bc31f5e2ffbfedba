"""`make convert` makes every pair of checkpoint and recipe, then the tree of all of them, and stops at what fails."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sa3_convert.checkpoint.variants import MINIATURE
from sa3_convert.cli import convert_all


def called(monkeypatch: pytest.MonkeyPatch, *words: str, fails: str = "nothing") -> tuple[list[list[str]], Result]:
    """Return the commands that are given, none of which does anything, and how it ends."""
    commands: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        commands.append(arguments)
        return 5 if fails in arguments else 0

    monkeypatch.setattr(convert_all, "sa3_convert", run)
    app = convert_all.typer.Typer()
    app.command()(convert_all.convert_all)
    return commands, CliRunner().invoke(app, list(words))


PAIRS = ("--recipe", "int8", "--recipe", "my/fp16.yaml", "--folder", "out", "here/music", "sfx/")


def test_every_checkpoint_is_converted_with_every_recipe_or_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    commands, result = called(monkeypatch, *PAIRS, "medium:medium,fp16")
    assert result.exit_code == 0
    *conversions, export = commands
    made = ["music-int8", "music-fp16", "sfx-int8", "sfx-fp16", "medium-medium", "medium-fp16"]
    assert [command[-1] for command in conversions] == [f"out/{name}" for name in made]
    assert conversions[1] == ["convert", "here/music", "--recipe", "my/fp16.yaml", "--out", "out/music-fp16"]
    assert conversions[4] == ["convert", "medium", "--recipe", "medium", "--out", "out/medium-medium"]
    bundles = [f"out/{name}" for name in made]
    assert export == ["bundle", "export", *bundles, "--to", "out/published", "--force"]


def test_what_fails_ends_it_with_its_exit_code_and_nothing_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    commands, result = called(monkeypatch, *PAIRS, fails="out/sfx-int8")
    assert result.exit_code == 5
    assert commands[-1][-1] == "out/sfx-int8"


def test_the_miniature_is_heard_and_it_is_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    commands, result = called(monkeypatch, "--recipe", "int8", "--folder", "out", MINIATURE)
    sounds = len(convert_all.SOUNDS)
    assert [command[0] for command in commands] == ["convert", *["run"] * sounds, "bundle"]
    for name, prompt in convert_all.SOUNDS.items():
        assert f"out/miniature-int8-{name}.wav  {prompt}" in result.stdout
    assert "make convert CHECKPOINT=" in result.stdout


def test_a_colon_may_be_of_the_folder_s_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    commands, _ = called(monkeypatch, "--recipe", "int8", "--folder", "out", str(folder), f"{folder}:fp16")
    assert [command[1:4] for command in commands[:2]] == [
        [str(folder), "--recipe", "int8"],
        [str(folder), "--recipe", "fp16"],
    ]
