"""`run` as a user runs it: files, batches, streams, bad input, interruption."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.errors import BundleError
from sa3_convert.runtime.audio import read_metadata

SHORT = ["--prompt", "pad", "--seconds", "0.5", "--steps", "2", "--threads", "2"]


def heed_interrupts() -> None:
    """Undo what a shell does to commands in the background: they are started deaf to Ctrl-C, and so are their own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def process(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "sa3_convert", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,
        **options,
    )


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what an error said: one paragraph on standard error, nothing on standard output."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.startswith("sa3-convert: ")
    return captured.err


@pytest.fixture
def run(toy_int8: Bundle) -> Callable[..., int]:
    return lambda *arguments: cli.run(["run", str(toy_int8.path), *arguments])


@pytest.fixture
def batch(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: Any) -> Path:
        path = tmp_path / "batch.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    return write


def test_settings_are_written_and_replay_to_the_same_file(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(*SHORT, "--seed", "7", "-o", str(tmp_path / "a.wav"), "--json", str(tmp_path / "a.json")) == 0
    assert run("--from", str(tmp_path / "a.json"), "-o", str(tmp_path / "b.wav"), "--threads", "2") == 0
    first, second = (soundfile.read(tmp_path / name)[0] for name in ("a.wav", "b.wav"))
    np.testing.assert_array_equal(first, second)
    assert json.loads((tmp_path / "a.json").read_text())["request"]["seed"] == 7
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_a_loop_has_its_samples_says_so_to_samplers_and_replays(run: Callable[..., int], tmp_path: Path) -> None:
    given = ["--prompt", "pad", "--bpm", "174", "--bars", "1", "--steps", "1", "--threads", "2", "--allow", "clipping"]
    assert run(*given, "-o", str(tmp_path / "a.wav"), "--json", str(tmp_path / "a.json")) == 0
    assert soundfile.info(tmp_path / "a.wav").frames == round(4 * 60 / 174 * 44100)
    kept = read_metadata(tmp_path / "a.wav")["request"]
    assert (kept["bpm"], kept["bars"], kept["beats_per_bar"], kept["seconds"]) == (174, 1, None, None)
    again = ["--from", str(tmp_path / "a.json"), "--threads", "2", "--allow", "clipping"]
    assert run(*again, "-o", str(tmp_path / "b.wav")) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    assert run(*again, "--beats-per-bar", "3", "-o", str(tmp_path / "c.wav")) == 0
    assert soundfile.info(tmp_path / "c.wav").frames == round(3 * 60 / 174 * 44100)


def test_settings_of_guidance_and_schedule_are_kept_and_replayed(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--cfg-scale", "3", "--cfg-interval", "0.2:0.9", "--cfg-rescale", "0.7", "--cfg-norm-threshold", "15"]
    given += ["--dist-shift", "flux:alpha_min=2,alpha_max=4", "--duration-padding", "1"]
    assert run(*SHORT, *given, "-o", str(tmp_path / "a.wav"), "--json", str(tmp_path / "a.json")) == 0
    assert run("--from", str(tmp_path / "a.json"), "-o", str(tmp_path / "b.wav"), "--threads", "2") == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    kept = read_metadata(tmp_path / "b.wav")["request"]
    assert (kept["cfg_interval"], kept["cfg_rescale"], kept["cfg_norm_threshold"]) == ([0.2, 0.9], 0.7, 15)
    assert kept["dist_shift"] == {
        "type": "flux", "min_length": 256, "max_length": 4096, "alpha_min": 2, "alpha_max": 4,
    }  # fmt: skip
    assert kept["duration_padding"] == 1
    assert "no effect" not in capsys.readouterr().err
    assert run(*SHORT, "--cfg-interval", "0.2:0.9", "-o", str(tmp_path / "c.wav")) == 0
    assert "Note: The interval of guidance has no effect without guidance (a scale of 1)." in capsys.readouterr().err


def test_settings_of_another_variant_are_not_replayed_and_those_of_other_models_with_a_note(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SHORT, "-o", str(tmp_path / "a.wav"), "--json", str(tmp_path / "a.json")) == 0
    told = json.loads((tmp_path / "a.json").read_text())
    replay = ("--from", str(tmp_path / "b.json"), "-o", str(tmp_path / "b.wav"), "--threads", "2")
    (tmp_path / "b.json").write_text(json.dumps({**told, "variant": "small-sfx"}))
    capsys.readouterr()
    assert run(*replay) == 3
    assert "small-sfx" in complaint(capsys)
    assert not (tmp_path / "b.wav").exists()
    (tmp_path / "b.json").write_text(json.dumps({**told, "models": {"dit": "0" * 64}}))
    assert run(*replay) == 0
    assert "other models" in capsys.readouterr().err


def test_a_stream_to_a_file_gives_the_same_samples_and_metadata(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(*SHORT, "-o", str(tmp_path / "whole.wav")) == 0
    assert run(*SHORT, "--stream", "-o", str(tmp_path / "grown.wav")) == 0
    whole, grown = (soundfile.read(tmp_path / name)[0] for name in ("whole.wav", "grown.wav"))
    np.testing.assert_array_equal(grown, whole)
    assert read_metadata(tmp_path / "grown.wav") == read_metadata(tmp_path / "whole.wav")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown.wav", "whole.wav"]


def test_a_stream_to_standard_output_is_samples_and_nothing_else(
    run: Callable[..., int], toy_int8: Bundle, tmp_path: Path
) -> None:
    assert run(*SHORT, "-o", str(tmp_path / "a.wav")) == 0
    expected, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    samples, messages = process("run", str(toy_int8.path), *SHORT, "--stream").communicate()
    np.testing.assert_array_equal(np.frombuffer(samples, "<i2").reshape(-1, 2), expected)
    assert b"s16le, 2 channels, 44100 Hz" in messages
    assert b"0.50 s of audio" in messages


def test_a_reader_that_goes_away_ends_the_stream_with_one_paragraph(toy_int8: Bundle) -> None:
    running = process("run", str(toy_int8.path), *SHORT, "--seconds", "20", "--stream")
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.read(100)
    running.stdout.close()
    message = running.stderr.read()
    running.stderr.close()
    assert running.wait() == 3
    assert b"closed the pipe" in message
    assert b"Exception" not in message


def test_a_batch_writes_a_file_and_a_line_each_and_the_second_time_nothing(
    run: Callable[..., int], batch: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = batch({"prompt": "drums", "seed": 1, "output": "drums.flac"}, {"seed": 2})
    arguments = ("--batch", str(file), *SHORT, "-o", str(tmp_path / "out"), "--keep-loaded")
    assert run(*arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[:2] for line in out] == [["line 1", " drums.flac"], ["line 2", " 0002.wav"]]
    assert soundfile.info(tmp_path / "out" / "drums.flac").frames == 22050
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["request"]["prompt"] for line in lines] == ["drums", "pad"]

    assert run(*arguments) == 0
    assert capsys.readouterr().out.count("done by an earlier run") == 2


def test_a_batch_with_a_rejected_output_makes_the_others_and_is_exit_8(
    run: Callable[..., int], batch: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Only a seed's low 32 bits count, so the second line's audio is the first one's.
    file = batch({"seed": 1}, {"seed": 1 + (1 << 32)}, {"seed": 3})
    assert run("--batch", str(file), *SHORT, "-o", str(tmp_path / "out")) == 8
    captured = capsys.readouterr()
    assert "line 2: 0002.wav: rejected" in captured.out
    assert "1 of 3 outputs" in captured.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001.wav", "0003.wav", "results.jsonl"]


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_an_interrupt_leaves_no_file(toy_int8: Bundle, tmp_path: Path, stream: tuple[str, ...]) -> None:
    long = ("--prompt", "pad", "--seconds", "60", "--steps", "1000", "--threads", "1")
    output = tmp_path / "out" / "x.wav"
    running = process("run", str(toy_int8.path), *long, *stream, "-o", str(output), start_new_session=True)
    deadline = time.monotonic() + 60
    while not (output.parent.is_dir() and any(output.parent.iterdir())):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGINT)
    _, message = running.communicate(timeout=60)
    assert running.returncode == 130
    # A stream tells first under which name it grows.
    assert message.decode().splitlines()[-1] == "sa3-convert: Interrupted; nothing half-written was left behind."
    assert len(message.splitlines()) == 1 + len(stream)
    assert list(output.parent.iterdir()) == []


def test_an_interrupted_batch_keeps_what_it_has_done_and_goes_on_from_there(
    toy_int8: Bundle, batch: Callable[..., Path], tmp_path: Path
) -> None:
    file = batch({"seed": 1}, {"seed": 2, "seconds": 60, "steps": 1000})
    arguments = ("run", str(toy_int8.path), "--batch", str(file), *SHORT, "-o", str(tmp_path / "out"))
    running = process(*arguments, start_new_session=True)
    assert running.stdout is not None
    assert running.stdout.readline().startswith(b"line 1: ")
    os.kill(running.pid, signal.SIGINT)
    out, message = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, b"")
    assert b"Traceback" not in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001.wav", "results.jsonl"]

    batch({"seed": 1}, {"seed": 2})
    again = subprocess.run([sys.executable, "-m", "sa3_convert", *arguments], capture_output=True, check=True)
    first, second = again.stdout.decode().splitlines()
    assert first.endswith("done by an earlier run")
    assert second.startswith("line 2: 0002.wav: seed 2, ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompt", "pad"),
        ("-o", "x.wav"),
        ("--prompt", "pad", "-o", "x.mid"),
        ("--prompt", "pad", "-o", "x.flac", "--stream"),
        ("--prompt", "pad", "-o", "x.wav", "--keep-loaded"),
        ("--prompt", "pad", "-o", "x.wav", "--seconds", "0"),
        ("--prompt", "pad", "-o", "x.wav", "--seconds", "-1"),
        ("--prompt", "pad", "-o", "x.wav", "--seconds", "nan"),
        ("--prompt", "pad", "-o", "x.wav", "--seconds", "1e9"),
        ("--prompt", "pad", "-o", "x.wav", "--steps", "0"),
        ("--prompt", "a\x07b", "-o", "x.wav"),
        ("--prompt", "pad", "-o", "x.wav", "--inpaint", "1-2", "--inpaint-audio", "a.wav"),
        ("--prompt", "pad", "-o", "x.wav", "--inpaint", "3:2", "--inpaint-audio", "a.wav"),
        ("--prompt", "pad", "-o", "x.wav", "--inpaint", "2:30", "--inpaint-audio", "a.wav", "--seconds", "9"),
        ("--prompt", "pad", "-o", "x.wav", "--inpaint", "1:3", "--inpaint", "2:4", "--inpaint-audio", "a.wav"),
        ("--prompt", "pad", "-o", "x.wav", "--inpaint", "1:3"),
        ("--prompt", "pad", "-o", "x.wav", "--bpm", "120"),
        ("--prompt", "pad", "-o", "x.wav", "--bpm", "120", "--bars", "4", "--seconds", "8"),
        ("--prompt", "pad", "-o", "x.wav", "--bpm", "120", "--bars", "4", "--stream"),
        ("--prompt", "pad", "-o", "x.wav", "--bpm", "120", "--bars", "60"),
        ("--prompt", "pad", "-o", "x.wav", "--cfg-interval", "0.5"),
        ("--prompt", "pad", "-o", "x.wav", "--cfg-interval", "0.5:0.2"),
        ("--prompt", "pad", "-o", "x.wav", "--dist-shift", "cosine"),
        ("--prompt", "pad", "-o", "x.wav", "--dist-shift", "flux:alpha_min"),
        ("--prompt", "pad", "-o", "x.wav", "--dist-shift", "flux:alpha_min=1,alpha_min=2"),
        ("--prompt", "pad", "-o", "x.wav", "--dist-shift", "flux:alpha=1"),
        ("--prompt", "pad", "-o", "x.wav", "--dist-shift", "logsnr:rate=2"),
        ("--prompt", "pad", "-o", "x.wav", "--allow", "everything"),
        ("--prompt", "pad", "-o", "x.wav", "--engine", "onnxruntime", "--memory", "low"),
        ("--prompt", "pad", "-o", "x.wav", "--json", "."),
        ("--prompt", "pad", "-o", "x.wav", "--json", "./x.wav"),
        ("--prompt", "pad", "-o", "x.wav", "--engine", "torch"),
        ("--prompt", "pad", "-o", "x.wav", "--checkpoint", "."),
        ("--batch", "x.jsonl"),
        ("--batch", "x.jsonl", "-o", "out", "--stream"),
        ("--batch", "x.jsonl", "-o", "out", "--json", "x.json"),
    ],
)
def test_what_cannot_be_asked_for_is_exit_2_and_writes_nothing(
    run: Callable[..., int],
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    complaint(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("", "holds no generation"),
        ("{", "line 1"),
        ('{"prompt": "a"}\n[1]', "line 2"),
        ('{"prompt": "a", "secnds": 3}', "seconds"),
        ('{"prompt": "a", "seconds": 1e9}', "Line 1"),
        ('{"prompt": "a", "output": "../a.wav"}', "plain file name"),
        ('{"prompt": "a", "init_audio": "none.wav"}', "none.wav"),
    ],
)
def test_a_bad_batch_is_told_by_its_line_and_makes_nothing(
    run: Callable[..., int],
    batch: Callable[..., Path],
    content: str | None,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "no.jsonl" if content is None else batch(content)
    assert run("--batch", str(file), "-o", str(tmp_path / "out")) in (2, 3)
    assert expected in complaint(capsys)
    assert list(tmp_path.glob("out/*")) == []


def bad_audio(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.wav"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not audio")
    elif kind == "eight-channels":
        soundfile.write(path, np.zeros((100, 8)), 44100)
    elif kind == "three-hours":
        soundfile.write(path, np.zeros(3 * 3600 * 100), 100)
    elif kind == "not-finite":
        soundfile.write(path, np.full(100, np.nan), 44100, subtype="FLOAT")
    return path


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "eight-channels", "three-hours", "not-finite"])
@pytest.mark.parametrize("option", ["--init-audio", "--inpaint-audio"])
def test_unusable_audio_is_exit_3_and_named(
    run: Callable[..., int], kind: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bad_audio(tmp_path, kind)
    region = ("--inpaint", "0:0.2") if option == "--inpaint-audio" else ()
    assert run(*SHORT, option, str(path), *region, "-o", str(tmp_path / "out.wav")) == 3
    assert str(path) in complaint(capsys)
    assert not (tmp_path / "out.wav").exists()


REQUEST = '{"prompt": "pad", "seconds": 0.2, "steps": 1}'


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{}",
        "[]",
        "null",
        '{"request": 3}',
        "[" * 100_000,
        "\xff",
        '{"request": {"prompt": "a", "prompt": "b"}}',
        '{"request": {"prompt": "a", "seconds": NaN}}',
        '{"request": {"prompt": "a", "seconds": 1e999}}',
        '{"request": {"prompt": "a", "seed": ' + "9" * 5000 + "}}",
        '{"request": {"prompt": "a", "init_audio": "a\\u0000b"}}',
        '{"request": {"prompt": "a\\ud800"}}',
        f'{{"request": {REQUEST}, "variant": 3}}',
        f'{{"request": {REQUEST}, "variant": ["small-music"]}}',
        f'{{"request": {REQUEST}, "models": "all"}}',
        f'{{"request": {REQUEST}, "models": null}}',
    ],
)
def test_settings_that_cannot_be_read_are_exit_3(
    run: Callable[..., int], content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content, encoding="latin-1")
    assert run("--from", str(tmp_path / "a.json"), "-o", str(tmp_path / "x.wav")) == 3
    assert "a.json" in complaint(capsys)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_settings_come_from_a_regular_file(
    run: Callable[..., int], make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "a.json")
    assert run("--from", str(tmp_path / "a.json"), "-o", str(tmp_path / "x.wav")) == 3
    assert "not a regular file" in complaint(capsys)


@pytest.mark.parametrize("prompt", ["", "🎹🥁", "x" * 100_000, "two\nlines\tand a tab"])
def test_strange_prompts_are_fine(run: Callable[..., int], prompt: str, tmp_path: Path) -> None:
    arguments = ("--seconds", "0.2", "--steps", "1", "--threads", "2")
    assert run("--prompt", prompt, *arguments, "-o", str(tmp_path / "x.wav")) == 0
    assert soundfile.info(tmp_path / "x.wav").frames == 8820


def test_torch_runs_the_checkpoint_that_the_bundle_was_made_from(
    run: Callable[..., int], toy_int8: Bundle, toy: Path, tmp_path: Path
) -> None:
    assert run(*SHORT, "--engine", "torch", "--checkpoint", str(toy), "-o", str(tmp_path / "torch.wav")) == 0
    assert run(*SHORT, "-o", str(tmp_path / "mnn.wav")) == 0
    reference, target = (soundfile.read(tmp_path / name)[0].ravel() for name in ("torch.wav", "mnn.wav"))
    assert np.corrcoef(reference, target)[0, 1] > 0.9
    settings = read_metadata(tmp_path / "torch.wav")
    assert settings["recipe"] is None
    assert settings["models"] == {c.value: d for c, d in toy_int8.manifest.checkpoint.digests.items()}


def test_torch_runs_a_checkpoint_without_a_bundle(toy: Path, run: Callable[..., int], tmp_path: Path) -> None:
    own, lent = tmp_path / "own.wav", tmp_path / "lent.wav"
    assert cli.run(["run", str(toy), *SHORT, "--engine", "torch", "-o", str(own)]) == 0
    assert run(*SHORT, "--engine", "torch", "--checkpoint", str(toy), "-o", str(lent)) == 0
    assert own.read_bytes() == lent.read_bytes()


def test_a_checkpoint_where_a_bundle_is_expected_names_commands_that_work(
    tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "my models" / "it's"
    shutil.copytree(toy, checkpoint)
    assert cli.run(["run", str(checkpoint), *SHORT, "-o", str(tmp_path / "x.wav")]) == 3
    said = complaint(capsys)
    assert "is a checkpoint, not a bundle" in said
    convert, run, torch = [shlex.split(line) for line in said.splitlines() if "sa3-convert " in line[:15]]
    assert convert[1:3] == ["convert", str(checkpoint)]
    monkeypatch.chdir(tmp_path)
    assert cli.run([*convert[1:], "--dry-run"]) == 0
    assert run[:3] == ["sa3-convert", "run", convert[convert.index("--out") + 1]]
    assert cli.run([*torch[1:], "--steps", "1", "--seconds", "0.3"]) == 0
    assert (tmp_path / "out.wav").is_file()


def test_medium_is_converted_with_its_own_recipe(tmp_path: Path) -> None:
    synthesize(tmp_path / "medium", "medium")
    with pytest.raises(BundleError, match=r"--recipe medium --out \S*/medium-medium\n"):
        Bundle.open(tmp_path / "medium")


def test_torch_refuses_another_checkpoint(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    synthesize(other, "small-music", "toy", 1, "gaussian")
    assert run(*SHORT, "--engine", "torch", "--checkpoint", str(other), "-o", str(tmp_path / "x.wav")) == 3
    assert "is not the one that" in complaint(capsys)


def test_a_folder_that_is_no_bundle_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["run", str(tmp_path), *SHORT, "-o", str(tmp_path / "x.wav")]) == 3
    assert "is no bundle" in complaint(capsys)


@pytest.fixture
def copy(toy_int8: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_int8.path, tmp_path / "bundle"))


@pytest.mark.parametrize(
    "name", ["dit.mnn", "tokenizer.json", "tokenizer.table", "bottleneck_params.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", [Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:-5])])
def test_a_damaged_bundle_is_exit_3_and_the_file_named(
    copy: Path, name: str, damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy / name)
    assert cli.run(["run", str(copy), *SHORT, "-o", str(copy.parent / "x.wav")]) == 3
    assert name in complaint(capsys)
    assert not (copy.parent / "x.wav").exists()


def test_a_bundle_whose_tokenizer_has_no_table_gives_the_same_audio(copy: Path) -> None:
    outputs = [copy.parent / name for name in ("with.wav", "without.wav")]
    assert cli.run(["run", str(copy), *SHORT, "-o", str(outputs[0])]) == 0
    manifest = json.loads((copy / "manifest.json").read_text())
    (tokenizer,) = (a for a in manifest["artifacts"] if a["kind"] == "tokenizer")
    assert tokenizer.pop("table")["path"] == "tokenizer.table"
    (copy / "tokenizer.table").unlink()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert cli.run(["run", str(copy), *SHORT, "-o", str(outputs[1])]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_the_table_is_read_instead_of_the_tokenizer(copy: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sa3_convert.runtime.pipeline import Pipeline; "
        "Pipeline.from_bundle(Path(sys.argv[1])).tokens('pad'); assert 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(copy)], check=True)


def test_a_bundle_without_encoder_generates_from_text_and_says_what_it_lacks_for_audio(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["artifacts"] = [a for a in manifest["artifacts"] if a["component"] != "encoder"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    output = copy.parent / "x.wav"
    assert cli.run(["run", str(copy), *SHORT, "-o", str(output)]) == 0
    capsys.readouterr()
    assert cli.run(["run", str(copy), *SHORT, "--init-audio", str(output), "-o", str(copy.parent / "y.wav")]) == 3
    assert "component 'encoder'" in complaint(capsys)
    assert not (copy.parent / "y.wav").exists()


def test_precision_low_is_given_to_what_is_right_with_it_and_the_rest_is_told(
    run: Callable[..., int], batch: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    low = [*SHORT, "--precision", "low"]
    assert run(*low, "-o", str(tmp_path / "a.wav"), "--json", str(figures)) == 0
    captured = capsys.readouterr()
    assert "at normal instead: number_conditioner, dit.\n" in captured.err
    assert "number_conditioner at normal, dit at normal" in captured.out
    engine = json.loads(figures.read_text())["engine"]
    assert (engine["precision"], engine["dit at"], engine["number_conditioner at"]) == ("low", "normal", "normal")
    assert {name for name in engine if name.endswith(" at")} == {"dit at", "number_conditioner at"}
    lines = batch({"prompt": "pad", "seconds": 0.5, "steps": 1})
    assert run("--batch", str(lines), "-o", str(tmp_path / "out"), "--precision", "low", "--allow", "silence") == 0
    assert capsys.readouterr().err.count("at normal instead: number_conditioner, dit.") == 1
    assert run(*SHORT, "-o", str(tmp_path / "b.wav")) == 0
    assert "instead" not in capsys.readouterr().err
