"""What `run` takes for its settings: options, files of settings, both; and how errors name them."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sa3_convert.cli.app as cli
import sa3_convert.cli.generate as generate
from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli.settings import OPTIONS
from sa3_convert.runtime.request import GenerateRequest

SHORT = ("--seconds", "0.2", "--steps", "1", "--threads", "2")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., GenerateRequest]:
    """Return what `run` would generate, instead of doing it."""

    def run(*arguments: str) -> GenerateRequest:
        found: list[GenerateRequest] = []
        monkeypatch.setattr(generate, "generate", lambda _, requests, **__: found.extend(requests))
        assert cli.run(["run", "bundle", "--engine", "mnn", *arguments, "-o", "x.wav"]) == 0
        return found[0]

    return run


def settings_file(path: Path, **request: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "request": {"prompt": "pad", **request}}))
    return path


def test_every_setting_is_an_option() -> None:
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(GenerateRequest)}


def test_what_the_command_line_tells_overrides_the_file(asked: Callable[..., GenerateRequest], tmp_path: Path) -> None:
    file = settings_file(tmp_path / "pad.json", seed=7, seconds=3, steps=4)
    request = asked("--from", str(file), "--seed", "3", "--prompt", "drums")
    assert (request.prompt, request.seed, request.seconds, request.steps) == ("drums", 3, 3.0, 4)


def test_paths_in_a_file_lead_from_its_folder_and_those_of_options_from_here(
    asked: Callable[..., GenerateRequest], tmp_path: Path
) -> None:
    file = settings_file(tmp_path / "there" / "a.json", init_audio="a.wav", inpaint_audio="b.wav", inpaint=[[0, 1]])
    request = asked("--from", str(file), "--inpaint-audio", "c.wav")
    assert (request.init_audio, request.inpaint_audio) == (tmp_path / "there" / "a.wav", Path("c.wav"))


def test_settings_replay_from_any_folder_and_move_with_their_audio(
    toy_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("run", str(toy_int8.path), *SHORT)
    (tmp_path / "work" / "out").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert cli.run([*run, "--prompt", "pad", "-o", "first.wav"]) == 0
    assert cli.run([*run, "--prompt", "pad", "--init-audio", "first.wav", "-o", "a.wav", "--json", "out/a.json"]) == 0
    assert json.loads(Path("out/a.json").read_text())["request"]["init_audio"] == str(Path("..", "first.wav"))
    (tmp_path / "work").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["run", str(toy_int8.path), "--from", "moved/out/a.json", "--threads", "2", "-o", "b.wav"]) == 0
    assert Path("b.wav").stat().st_size > 0


WRONG = [
    ("--seconds", "0"),
    ("--seconds", "nan"),
    ("--seed", "-1"),
    ("--steps", "0"),
    ("--cfg-scale", "inf"),
    ("--apg-scale", "nan"),
    ("--negative-prompt", "a\x07"),
    ("--init-noise-level", "0.5"),
    ("--init-noise-level", "2"),
    ("--inpaint", "1:2"),
    ("--inpaint", "1:2", "--inpaint", "1:3", "--inpaint-audio", "a.wav"),
    ("--inpaint", "4:40", "--inpaint-audio", "a.wav", "--seconds", "10"),
    ("--inpaint-audio", "a.wav"),
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_an_error_names_settings_as_options_where_they_came_from_there(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["run", "bundle", "--prompt", "pad", *arguments, "-o", "x.wav"]) == 2
    message = capsys.readouterr().err
    assert arguments[0] in message
    assert not re.search(r"(?<!-)\b[a-z]+_[a-z]+", message)


def test_an_error_names_a_setting_as_the_file_does_that_brought_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = settings_file(tmp_path / "a.json", inpaint_audio="a.wav")
    assert cli.run(["run", "bundle", "--from", str(file), "-o", "x.wav"]) == 2
    assert f"inpaint_audio of {file} needs --inpaint:" in capsys.readouterr().err
    file = settings_file(tmp_path / "a.json", init_audio=None)
    assert cli.run(["run", "bundle", "--from", str(file), "--init-noise-level", "0.3", "-o", "x.wav"]) == 2
    assert "--init-noise-level needs --init-audio" in capsys.readouterr().err


def test_what_only_the_model_can_refuse_is_told_in_the_same_words(
    toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("run", str(toy_int8.path), "-o", str(tmp_path / "x.wav"))
    assert cli.run([*run, "--prompt", "pad", "--seconds", "999"]) == 2
    assert "--seconds is 999, beyond" in capsys.readouterr().err
    file = settings_file(tmp_path / "a.json", seconds=999)
    assert cli.run([*run, "--from", str(file)]) == 2
    assert f"seconds of {file} is 999, beyond" in capsys.readouterr().err


def test_a_batch_names_a_lines_settings_as_the_line_does_and_defaults_as_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = tmp_path / "batch.jsonl"
    run = ("run", "bundle", "--batch", str(batch), "-o", str(tmp_path / "out"))
    batch.write_text('{"prompt": "pad", "init_noise_level": 0.5}')
    assert cli.run(list(run)) == 2
    assert "line 1: init_noise_level needs init_audio" in capsys.readouterr().err
    batch.write_text('{"prompt": "pad"}')
    assert cli.run([*run, "--init-noise-level", "0.5"]) == 2
    assert "line 1: --init-noise-level needs init_audio" in capsys.readouterr().err
