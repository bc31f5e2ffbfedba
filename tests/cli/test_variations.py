"""Variations, seeds that are drawn, settings from audio, and files that are not written over."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from sa3_convert.runtime.audio import read_metadata

SHORT = ("--seconds", "0.2", "--steps", "1", "--threads", "2")


@pytest.fixture
def run(toy_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: cli.run(["run", str(toy_int8.path), *arguments])


def test_variations_have_seeds_that_follow_one_another_and_files_of_their_own(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "pad", *SHORT, "--seed", "7", "-n", "3", "-o", "pad.wav", "--json", "pad.json") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pad-1.wav", "pad-2.wav", "pad-3.wav", "pad.json"]
    assert [read_metadata(Path(f"pad-{n}.wav"))["request"]["seed"] for n in (1, 2, 3)] == [7, 8, 9]
    entries = json.loads(Path("pad.json").read_text())["variations"]
    assert [(entry["output"], entry["request"]["seed"]) for entry in entries] == [
        ("pad-1.wav", 7),
        ("pad-2.wav", 8),
        ("pad-3.wav", 9),
    ]
    assert run("--prompt", "pad", *SHORT, "--seed", "8", "-o", "alone.wav") == 0
    assert Path("alone.wav").read_bytes() == Path("pad-2.wav").read_bytes()
    capsys.readouterr()
    assert run("--from", "pad.json", "-o", "x.wav") == 3
    assert "it has several" in capsys.readouterr().err


def test_names_of_many_variations_sort() -> None:
    from sa3_convert.cli.generate import Target

    target = Target(Path("b"), "mnn", {}, Path("out/a.b.wav"), "pcm16", False, (), None)
    assert [path.name for path in target.outputs(10)][::9] == ["a.b-01.wav", "a.b-10.wav"]


@pytest.mark.parametrize("output", [(), ("-o", "-"), ("--stream",), ("--stream", "-o", "-")])
def test_variations_do_not_go_into_one_stream(
    run: Any, output: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "pad", "-n", "2", *output) == 2
    assert "-o FILE.wav" in capsys.readouterr().err


def test_no_variation_is_made_if_one_would_replace_a_file(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pad-2.wav").write_text("precious")
    assert run("--prompt", "pad", *SHORT, "-n", "2", "-o", "pad.wav") == 2
    assert "pad-2.wav exists" in capsys.readouterr().err
    assert not Path("pad-1.wav").exists()


def test_a_drawn_seed_is_told_and_repeats_from_the_audio_itself(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "pad", *SHORT, "--seed", "random", "-o", "a.wav") == 0
    seed = read_metadata(Path("a.wav"))["request"]["seed"]
    assert f"seed {seed}," in capsys.readouterr().out
    assert run("--from", "a.wav", "-o", "b.flac", "--threads", "2") == 0
    assert (soundfile.read("a.wav")[0] == soundfile.read("b.flac")[0]).all()
    assert run("--from", "b.flac", "--seed", "1", "-o", "c.wav", "--threads", "2") == 0
    assert read_metadata(Path("c.wav"))["request"] == read_metadata(Path("a.wav"))["request"] | {"seed": 1}


@pytest.mark.parametrize("seed", ["", "rnd", "1.5", "9" * 5000, "-1"])
def test_what_is_no_seed_is_refused(run: Any, seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "pad", f"--seed={seed}", "-o", "x.wav") == 2
    assert "--seed is" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"RIFF", b"text"])
def test_audio_without_settings_is_told(run: Any, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.wav").write_bytes(content)
    assert run("--from", "a.wav", "-o", "x.wav") == 3
    assert "a.wav" in capsys.readouterr().err


def test_a_file_is_replaced_by_its_like_and_by_others_only_with_force(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ("--prompt", "pad", *SHORT, "-o", "a.wav")
    assert run(*first) == 0
    assert run(*first) == 0
    assert run(*first, "--seed", "3") == 2
    assert "a.wav exists, and was not made with these settings. Name another file, or give --force." in (
        capsys.readouterr().err
    )
    assert run(*first, "--seed", "3", "--force") == 0
    assert run(*first, "--stream") == 2
    Path("a.wav").write_text("a song of somebody")
    assert run(*first) == 2
    assert Path("a.wav").read_text() == "a song of somebody"


def test_a_piece_lasts_as_long_as_the_given_audio(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "pad", *SHORT, "-o", "a.wav") == 0
    capsys.readouterr()
    assert run("--prompt", "pad", "--steps", "1", "--init-audio", "a.wav", "-o", "b.wav", "--threads", "2") == 0
    assert "0.20 seconds, as the given audio" in capsys.readouterr().err
    assert soundfile.info("b.wav").frames == soundfile.info("a.wav").frames


@pytest.mark.parametrize("name", ["a.ogg", "a.mp3"])
def test_a_lossy_file_carries_its_settings_too(run: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "pad", *SHORT, "-o", "a.wav") == 0
    assert run("--prompt", "pad", *SHORT, "-o", name) == 0
    assert read_metadata(Path(name)) == read_metadata(Path("a.wav"))
    assert abs(soundfile.info(name).frames - soundfile.info("a.wav").frames) <= 1
    assert run("--from", name, "-o", "b.wav", "--threads", "2") == 0
    assert Path("b.wav").read_bytes() == Path("a.wav").read_bytes()
    assert run("--prompt", "pad", "-o", name, "--format", "pcm24") == 2
    assert "stores no such samples" in capsys.readouterr().err


def test_an_unknown_ending_is_told_with_those_that_work(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "pad", "-o", "a.mid") == 2
    assert "Name it .wav or .flac or .ogg or .mp3." in capsys.readouterr().err


@pytest.mark.parametrize("how", [("--peak", "attenuate"), ("--loudness", "-14")])
def test_a_stream_does_not_wait_for_the_whole(
    run: Any, how: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "pad", *how, "--stream", "-o", "a.wav") == 2
    assert "--peak attenuate and --loudness need the whole piece first" in capsys.readouterr().err


def test_levels_are_settings_that_are_kept(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "pad", *SHORT, "--peak", "attenuate", "--loudness", "-20", "-o", "a.wav") == 0
    assert "LUFS" in capsys.readouterr().err
    request = read_metadata(Path("a.wav"))["request"]
    assert (request["peak"], request["loudness"]) == ("attenuate", -20.0)


def test_what_was_made_is_played(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[Any] = []
    device = SimpleNamespace(
        PortAudioError=RuntimeError,
        check_output_settings=lambda **_: None,
        play=lambda samples, rate, blocking: played.append((len(samples), rate, blocking)),
    )
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    assert run("--prompt", "pad", *SHORT, "-n", "2", "--play", "-o", "a.flac") == 0
    assert played == [(8820, 44100, True)] * 2


def test_where_nothing_can_be_heard_the_file_is_made_and_it_is_told(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no device")

    monkeypatch.setitem(
        sys.modules, "sounddevice", SimpleNamespace(PortAudioError=RuntimeError, check_output_settings=refuse)
    )
    assert run("--prompt", "pad", *SHORT, "--play", "-o", "a.wav") == 0
    assert "Note: nothing can be played here (no device); the files are there." in capsys.readouterr().err
    assert Path("a.wav").exists()
    assert run("--prompt", "pad", "--play", "-o", "-") == 2
