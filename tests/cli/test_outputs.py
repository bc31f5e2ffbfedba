"""Where commands write: files, links, pipes and standard output alike, never over what they read."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import soundfile
import typer

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from sa3_convert.recipe import own_recipes
from tests.cli.test_run import SHORT, process

ONE = ["--component", "dit"]
BENCH = ["--engine", "mnn", "--seconds", "1", "--repeats", "1"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stand-ins for everything that commands read; nothing of it is valid."""
    monkeypatch.chdir(tmp_path)
    for folder in ("q", "p", "c"):
        (tmp_path / folder).mkdir()
    for name in ("q/manifest.json", "q/dit.mnn", "c/model.safetensors", "a.wav", "a.json", "b.jsonl", "l.safetensors"):
        (tmp_path / name).write_text(name)
    for name in ("i.npz", "s.json", "d.json", "r.yaml", "g.onnx", "g.onnx.data"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("q/dit.mnn")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


RUN = ["run", "q", "--prompt", "pad"]
OVER_WHAT_IS_READ = [
    [*RUN, "-o", "x.wav", "--json", "q/../q/manifest.json"],
    [*RUN, "-o", "x.wav", "--json", "link"],
    [*RUN, "-o", "link", "--stream"],
    [*RUN, "--init-audio", "a.wav", "-o", "./a.wav"],
    [*RUN, "--inpaint-audio", "a.wav", "--inpaint", "0:1", "-o", "q/../a.wav"],
    [*RUN, "-o", "x.wav", "--engine", "torch", "--checkpoint", "c", "--json", "c/model.safetensors"],
    [*RUN, "-o", "x.wav", "--engine", "torch", "--lora", "l.safetensors:0.5", "--json", "l.safetensors"],
    ["run", "q", "--from", "a.json", "-o", "x.wav", "--json", "a.json"],
    ["verify", "q", "--json", "q/dit.mnn"],
    ["verify", "q", "--report", "r", "--since", "s.json", "--json", "s.json"],
    ["verify", "q", "--report", "q/report"],
    ["bisect", "q", *ONE, "--json", "link"],
    ["bisect", "q", *ONE, "--input", "i.npz", "--json", "i.npz"],
    ["bench", "q", "--json", "q/manifest.json"],
    ["bench", "q", "--checkpoint", "c", "--json", "c/model.safetensors"],
    ["drift", "q", "--baseline", "d.json", "--json", "./d.json"],
    ["plan", "c", *ONE, "--target-mib", "1", "--recipe", "r.yaml", "--out", "r.yaml"],
    ["plan", "c", *ONE, "--target-mib", "1", "--recipe", "int8", "--out", str(own_recipes()["int8"])],
    ["plan", "c", *ONE, "--target-mib", "1", "--out", "c/model.safetensors"],
    ["convert", "c", "--out", "c"],
    ["convert", "c", "--out", "c/bundle", "--dry-run"],
    ["convert", "c", "--out", ".", "--force"],
    ["export", "c", *ONE, "--out", "c/model.safetensors"],
    ["export", "c", *ONE, "--lora", "l.safetensors", "--out", "l.safetensors"],
    ["fuse", "g.onnx", *ONE, "--out", "g.onnx"],
    ["fuse", "g.onnx", *ONE, "--recipe", "r.yaml", "--out", "r.yaml"],
    ["mnn", "g.onnx", *ONE, "--out", "g.onnx.data"],
    ["bundle", "export", "p", "q", "--to", "q/site"],
    ["bundle", "export", "p", "q", "--to", "."],
]  # fmt: skip


@pytest.mark.parametrize("arguments", OVER_WHAT_IS_READ, ids=" ".join)
def test_no_command_writes_over_what_it_reads(
    here: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    recipe = own_recipes()["int8"].read_bytes()
    assert cli.run(arguments) == 2
    assert "what is read: " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
    assert own_recipes()["int8"].read_bytes() == recipe


@pytest.mark.parametrize(
    ("audio", "settings"),
    [("q.wav", "q/../q.wav"), ("q.wav", "Q.WAV"), ("-", "-"), ("/dev/stdout", "-"), ("pipe", "pipe")],
)
@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_audio_and_settings_are_not_one_file(
    here: Path, audio: str, settings: str, stream: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*RUN, *stream, "-o", audio, "--json", settings]) == 2
    assert "are one file" in capsys.readouterr().err


def test_samples_and_settings_do_not_share_standard_output(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*RUN, "--stream", "--json", "-"]) == 2
    assert "are one file" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["pipe", "-", "/dev/stdout", "/dev/null"])
@pytest.mark.parametrize("command", [["export", "c"], ["fuse", "g.onnx"], ["mnn", "g.onnx"]], ids=" ".join)
def test_a_model_is_not_written_where_its_second_file_has_no_place(
    here: Path, command: list[str], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*command, *ONE, "--out", out]) == 2
    assert "a second file beside it" in capsys.readouterr().err
    assert stat.S_ISFIFO((here / "pipe").stat().st_mode)


@pytest.mark.parametrize("out", ["pipe", "-", "a.wav"])
@pytest.mark.parametrize(
    "command",
    [
        [*RUN, "--batch", "b.jsonl", "-o"],
        ["convert", "c", "--out"],
        ["verify", "q", "--report"],
        ["bundle", "export", "q", "--to"],
        ["checkpoint", "synthesize"],
        ["checkpoint", "train-miniature"],
    ],
    ids=" ".join,
)
def test_what_is_no_folder_is_not_taken_for_one(here: Path, command: list[str], out: str) -> None:
    before = {path.name for path in here.iterdir()}
    assert cli.run([*command, out]) in (2, 3)
    assert {path.name for path in here.iterdir()} == before


@pytest.mark.parametrize("name", ["q", "a.wav/x.json"])
def test_a_place_where_no_file_can_be_is_told_before_any_work(
    here: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["verify", "p", "--json", name],
        ["bench", "p", "--json", name],
        [*RUN, "-o", "b", "--json", name],
    ):
        assert cli.run(arguments) == 2
        assert f"--json {name}" in capsys.readouterr().err


def test_every_path_of_every_command_says_whether_it_is_read_or_written() -> None:
    """What an option does with its path is checked as it is parsed; one that says nothing is checked by nobody."""
    silent = []

    def look(app: typer.Typer) -> None:
        for group in app.registered_groups:
            assert group.typer_instance is not None
            look(group.typer_instance)
        for command in app.registered_commands:
            assert command.callback is not None
            for name, hint in get_type_hints(command.callback, include_extras=True).items():
                kind, *described = (*get_args(hint), None)
                is_path = "Path" in str(kind) or name in ("checkpoint", "lora")
                if is_path and getattr(described[0], "callback", None) is None:
                    silent.append(f"{command.callback.__name__} {name}")

    look(cli.app)
    assert set(silent) == {
        # A file or a folder, by another option.
        "run output",
        # Where files have names of their own, by content.
        *(f"{command} cache" for command in ("convert", "plan", "sweep")),
        *(f"{command} references" for command in ("verify", "bisect", "drift")),
        # Of commands that write nothing.
        "table bench",
    }


@pytest.fixture
def run(toy_int8: Bundle) -> Callable[..., int]:
    return lambda *arguments: cli.run(["run", str(toy_int8.path), *arguments])


@pytest.fixture
def whole(run: Callable[..., int], tmp_path: Path) -> bytes:
    assert run(*SHORT, "-o", str(tmp_path / "whole.wav")) == 0
    return (tmp_path / "whole.wav").read_bytes()


def test_audio_on_standard_output_is_a_wav_and_nothing_else(toy_int8: Bundle, whole: bytes) -> None:
    audio, messages = process("run", str(toy_int8.path), *SHORT, "-o", "-").communicate()
    assert audio == whole
    assert b"0.50 s of audio" in messages


def test_a_stream_to_standard_output_by_name_is_samples(toy_int8: Bundle, whole: bytes) -> None:
    samples, _ = process("run", str(toy_int8.path), *SHORT, "--stream", "-o", "/dev/stdout").communicate()
    assert len(samples) == 22050 * 4
    assert samples in whole


@pytest.mark.parametrize("stream", [[], ["--stream"]])
@pytest.mark.parametrize("name", ["pipe.wav", "pipe"])
def test_a_pipe_is_written_to(
    run: Callable[..., int], whole: bytes, tmp_path: Path, name: str, stream: list[str]
) -> None:
    os.mkfifo(tmp_path / name)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / name).read_bytes()))
    reader.start()
    assert run(*SHORT, *stream, "-o", str(tmp_path / name)) == 0
    reader.join()
    assert whole[44 : 44 + 22050 * 4] in read[0]
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_link_is_followed_and_what_it_leads_to_is_replaced(
    run: Callable[..., int], whole: bytes, tmp_path: Path, stream: list[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "real.wav").write_text("old")
    (tmp_path / "link.wav").symlink_to("elsewhere/real.wav")
    (tmp_path / "link.json").symlink_to("elsewhere/real.json")
    output = ["-o", str(tmp_path / "link.wav"), "--json", str(tmp_path / "link.json")]
    assert run(*SHORT, *stream, *output) == 2
    assert run(*SHORT, *stream, *output, "--force") == 0
    assert (tmp_path / "link.wav").is_symlink()
    assert soundfile.info(tmp_path / "elsewhere" / "real.wav").frames == 22050
    assert json.loads((tmp_path / "elsewhere" / "real.json").read_text())["request"]["prompt"] == "pad"
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["real.json", "real.wav"]


@pytest.mark.parametrize(
    "command",
    [
        ["verify", "BUNDLE", "--quick", "--component", "number_conditioner"],
        ["bisect", "BUNDLE", "--component", "number_conditioner"],
        ["run", "BUNDLE", *SHORT, "-o", "OUT.wav"],
        pytest.param(
            ["bench", "BUNDLE", "--engine", "mnn", "--seconds", "1", "--repeats", "1"], marks=pytest.mark.slow
        ),
    ],
    ids=lambda command: command[0],
)
def test_json_on_standard_output_is_valid_and_tables_go_to_standard_error(
    toy_int8: Bundle, tmp_path: Path, command: list[str]
) -> None:
    places = {"BUNDLE": str(toy_int8.path), "OUT.wav": str(tmp_path / "out.wav")}
    arguments = [places.get(part, part) for part in command]
    for name in ("-", "/dev/stdout"):
        out, told = process(*arguments, "--json", name).communicate()
        assert isinstance(json.loads(out), dict)
        assert told
    with (tmp_path / "log").open("wb") as log:
        subprocess.run([sys.executable, "-m", "sa3_convert", *arguments, "--json", "-"], stdout=log, check=True)
    assert json.loads((tmp_path / "log").read_text()).keys() == json.loads(out).keys()


CLOSED = [
    [],
    ["--help"],
    ["--version"],
    ["nonsense"],
    ["inspect", "BUNDLE/number_conditioner.mnn"],
    ["inspect", "BUNDLE/number_conditioner.mnn", "--json"],
    ["table", "BUNDLE"],
    ["bundle", "export", "BUNDLE", "--to", "SITE"],
    ["verify", "BUNDLE", "--quick", "--component", "number_conditioner", "--json", "VERIFIED"],
    ["bisect", "BUNDLE", "--component", "number_conditioner", "--json", "BISECTED"],
    ["checkpoint", "synthesize", "CHECKPOINT"],
    ["convert", "TOY", "--out", "NEW", "--dry-run"],
    ["run", "BUNDLE", *SHORT, "-o", "AUDIO.wav", "--json", "SETTINGS"],
    ["run", "BUNDLE", *SHORT, "--batch", "BATCH", "-o", "FOLDER"],
    pytest.param(["doctor"], marks=pytest.mark.slow),
    pytest.param(["doctor", "--json"], marks=pytest.mark.slow),
    pytest.param(["bench", "BUNDLE", *BENCH], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-", "2>&1 | true"])
@pytest.mark.parametrize("command", CLOSED, ids=" ".join)
def test_a_closed_standard_stream_loses_no_work_and_is_no_bug(
    toy_int8: Bundle, toy: Path, tmp_path: Path, command: list[str], closed: str
) -> None:
    (tmp_path / "BATCH").write_text('{"seed": 1}\n{"seed": 2}\n')
    places = {"BUNDLE": str(toy_int8.path), "TOY": str(toy)}
    arguments = [places.get(part, part).replace("BUNDLE/", f"{toy_int8.path}/") for part in command]
    script = f'"$@" {closed}; echo "${{PIPESTATUS[0]}}" >&3'
    (tmp_path / "code").touch()
    with (tmp_path / "code").open("r+") as code:
        done = subprocess.run(
            ["bash", "-c", f"exec 3<> code; {script}", "bash", sys.executable, "-m", "sa3_convert", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=code,
            capture_output=True,
            text=True,
            check=False,
        )
    # A reader that has gone is 141 where anything was left to say.
    usage = command in ([], ["nonsense"]) or (command[-1] == "--json" and ">&-" in closed)
    assert int((tmp_path / "code").read_text()) in ({2} if usage else {0, 141})
    for text in (done.stdout, done.stderr):
        assert "Traceback" not in text
        assert "Exception ignored" not in text
        assert "bug in" not in text
    for name in command:
        if name in ("SITE", "CHECKPOINT", "FOLDER", "VERIFIED", "BISECTED", "SETTINGS"):
            assert (tmp_path / name).exists()
    if "AUDIO.wav" in command:
        assert soundfile.info(tmp_path / "AUDIO.wav").frames == 22050
    if "BATCH" in command:
        assert sorted(path.name for path in (tmp_path / "FOLDER").iterdir()) == [
            "0001.wav",
            "0002.wav",
            "results.jsonl",
        ]


def test_output_that_was_asked_for_on_a_closed_standard_output_is_refused_before_any_work(toy_int8: Bundle) -> None:
    for output in (["-o", "-"], ["-o", "/dev/null", "--json", "-"], ["--stream"]):
        command = [sys.executable, "-m", "sa3_convert", "run", str(toy_int8.path), *SHORT, *output]
        done = subprocess.run(["bash", "-c", '"$@" >&-', "bash", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "is closed" in done.stderr


def test_what_a_killed_run_left_is_swept_by_the_next_that_writes_there(toy_int8: Bundle, tmp_path: Path) -> None:
    long = ["--prompt", "pad", "--seconds", "60", "--steps", "1000", "--threads", "1"]
    for options in (["-o", "x.wav"], ["--stream", "-o", "y.wav"]):
        running = process("run", str(toy_int8.path), *long, *options, cwd=tmp_path, start_new_session=True)
        deadline = time.monotonic() + 60
        name = options[-1]
        while not any(path.name.startswith(f".{name}.") for path in tmp_path.iterdir()):
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    # The second one has swept what the first one left.
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".y.wav.")
    subprocess.run(
        [sys.executable, "-m", "sa3_convert", "run", str(toy_int8.path), *SHORT, "-o", "z.wav"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["z.wav"]


def test_a_second_batch_into_the_folder_is_exit_2(
    toy_int8: Bundle, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.jsonl").write_text('{"seconds": 0.5, "steps": 1}\n{"seconds": 60, "steps": 1000}\n')
    (tmp_path / "short.jsonl").write_text('{"seed": 5}\n')
    common = ("--prompt", "pad", "-o", str(tmp_path / "out"), "--threads", "1")
    running = process("run", str(toy_int8.path), "--batch", str(tmp_path / "long.jsonl"), *common)
    assert running.stdout is not None
    assert running.stdout.readline().startswith(b"line 1: ")
    try:
        assert run("--batch", str(tmp_path / "short.jsonl"), *common) == 2
        assert "Another batch is writing into" in capsys.readouterr().err
    finally:
        running.send_signal(signal.SIGINT)
        running.communicate()


def test_exported_files_share_nothing_with_their_bundle(
    toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(toy_int8.path, tmp_path / "bundle"))
    (bundle / "dit.mnn").rename(bundle / "blob")
    (bundle / "dit.mnn").symlink_to("blob")
    (bundle / "blob").chmod(0o400)
    before = {path: path.stat() for path in bundle.iterdir()}
    mask = os.umask(0o027)
    try:
        assert cli.run(["bundle", "export", str(bundle), "--to", str(tmp_path / "site"), "--layout", "flat"]) == 0
    finally:
        os.umask(mask)
    below = list((tmp_path / "site").rglob("*"))
    folders = [tmp_path / "site", *(path for path in below if path.is_dir() and not path.is_symlink())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o750}
    exported = [path for path in below if path not in folders]
    assert len(exported) > len(toy_int8.components)
    for path in exported:
        assert not path.is_symlink()
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert path.stat().st_nlink == 1
        path.write_bytes(b"edited")
    after = {path: path.stat() for path in before}
    assert [(s.st_ino, s.st_mode, s.st_ctime_ns, s.st_nlink) for s in after.values()] == [
        (s.st_ino, s.st_mode, s.st_ctime_ns, s.st_nlink) for s in before.values()
    ]
    Bundle.open(bundle).check()


@pytest.mark.slow
def test_a_hundred_pairs_of_streams_to_one_name_leave_the_audio_of_one_each(toy_int8: Bundle, tmp_path: Path) -> None:
    """A fixed name for both gave the other's audio with exit 0, six times of six."""
    expected = {}
    for seed in ("1", "2"):
        alone = tmp_path / f"{seed}.wav"
        command = ["run", str(toy_int8.path), *SHORT, "--seed", seed, "--stream"]
        assert cli.run([*command, "-o", str(alone)]) == 0
        expected[alone.read_bytes()] = seed
    assert len(expected) == 2
    song = tmp_path / "both" / "song.wav"
    winners = []
    for _ in range(100):
        running = [
            process("run", str(toy_int8.path), *SHORT, "--seed", seed, "--stream", "-o", str(song)) for seed in "12"
        ]
        ended = [one.communicate()[1] for one in running]
        assert [one.returncode for one in running] == [0, 0], ended
        assert [path.name for path in song.parent.iterdir()] == ["song.wav"]
        winners.append(expected[song.read_bytes()])
        song.unlink()
    assert len(winners) == 100
