"""A command that is asked to stop at any moment leaves whole files or none, no process, and the right exit code."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile

from sa3_convert.bundle.reader import Bundle
from sa3_convert.system.files import sha256_file
from tests.robustness.trials import Server, moments

ROOT = Path(__file__).parents[2]
SETTINGS = ("--prompt", "pad", "--seconds", "1", "--steps", "2", "--threads", "1")
FRAMES = 44100
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COMMANDS = ("run", "stream", "batch", "export", "convert")


@dataclass
class Stage:
    """Where commands are played: an own folder for outputs, one for temporary files, and what they are given."""

    server: Server
    folder: Path
    bundle: Bundle
    checkpoint: Path
    whole: dict[str, dict[str, str]]
    """SHA-256 of what a clean export and a clean conversion write, by path."""

    def command(self, name: str) -> list[str]:
        out = self.folder / "out"
        match name:
            case "export":
                return ["bundle", "export", str(self.bundle.path), "--to", str(out)]
            case "convert":
                places = ("--out", str(out), "--cache", str(self.folder / "cache"), "--threads", "1")
                return ["convert", str(self.checkpoint), *places, "--component", "number_conditioner"]
            case "batch":
                lines = [json.dumps({"seed": seed}) for seed in range(3)]
                (self.folder / "batch.jsonl").write_text("\n".join(lines))
                batch = ("--batch", str(self.folder / "batch.jsonl"), "-o", str(out))
                return ["run", str(self.bundle.path), *SETTINGS, *batch]
            case _:
                stream = ("--stream",) if name == "stream" else ()
                return ["run", str(self.bundle.path), *SETTINGS, *stream, "-o", str(out / "x.wav")]

    def play(self, name: str, number: signal.Signals | None = None, after: float = 0, *, to_all: bool = False) -> float:
        """Run a command, send it a signal after some seconds, check what is left; return how long it took."""
        for part in ("out", "cache", "tmp"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
        (self.folder / "tmp").mkdir()
        before = time.monotonic()
        process, log = self.server.supervise(self.command(name), self.folder / "tmp")
        assert process.pid is not None
        if number is not None:
            process.join(after)
            if process.exitcode is None and to_group_is_set(process.pid):
                (os.killpg if to_all else os.kill)(process.pid, number)
        process.join(120)
        took = time.monotonic() - before
        said = log.read_text()
        # Before it takes notice of signals it has begun nothing, and ends as any program does.
        early = {-number} if number is not None and not said else set()
        wanted = {0} if number is None else {0, 128 + number} | early
        assert process.exitcode in wanted, (process.exitcode, after, said)
        if process.exitcode > 0:
            word = "Interrupted" if number == signal.SIGINT else "Terminated"
            assert said.splitlines()[-1] == f"sa3-convert: {word}; nothing half-written was left behind.", said
        assert "Traceback" not in said, said
        assert companions(process.pid) == []
        assert list((self.folder / "tmp").iterdir()) == []
        self.check(name, finished=process.exitcode == 0)
        return took

    def kill(self, name: str, after: float) -> None:
        """Kill a command's watching parent after some seconds, and run the same command to its end."""
        process, _ = self.server.supervise(self.command(name), self.folder / "tmp")
        process.join(after)
        process.kill()
        process.join()
        assert process.pid is not None
        deadline = time.monotonic() + 30
        while companions(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if name == "export" and (self.folder / "out").exists():
            # It came to its end before the kill, and writes into new folders alone.
            self.check(name, finished=True)
            shutil.rmtree(self.folder / "out")
        process, log = self.server.supervise(self.command(name), self.folder / "tmp")
        process.join(120)
        assert process.exitcode == 0, log.read_text()
        self.check(name, finished=True)

    def check(self, name: str, *, finished: bool) -> None:
        out = self.folder / "out"
        files = {str(f.relative_to(out)): f for f in sorted(out.rglob("*")) if f.is_file()} if out.is_dir() else {}
        partial = [f for place in ("out", "cache") for f in (self.folder / place).rglob("*") if "partial" in f.name]
        assert partial == []
        if name in ("run", "stream"):
            assert list(files) in ([["x.wav"]] if finished else [["x.wav"], []])
        for relative, file in files.items():
            if file.suffix == ".wav":
                assert soundfile.info(file).frames == FRAMES
            elif relative in self.whole.get(name, {}):
                assert sha256_file(file) == self.whole[name][relative], relative
        if name == "batch" and "results.jsonl" in files:
            for line in files["results.jsonl"].read_text().splitlines():
                result = json.loads(line)
                assert sha256_file(out / result["output"]) == result["file_sha256"]
        if finished:
            assert files.keys() >= self.whole.get(name, {}).keys()


def to_group_is_set(process: int) -> bool:
    """Tell whether a command has a process group of its own yet: a signal would otherwise reach this one's."""
    try:
        return os.getpgid(process) == process
    except ProcessLookupError:
        return False


def companions(group: int) -> list[str]:
    """Return the processes of a group that live, by their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, its_group = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
                if int(its_group) == group and state != "Z":
                    found.append((entry / "cmdline").read_text())
            except (OSError, ValueError):
                continue
    return found


@pytest.fixture(scope="module")
def stage(toy_int8: Bundle, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("signals")
    working = Path.cwd()
    os.chdir(ROOT)
    stage = Stage(Server(tmp_path_factory.mktemp("logs")), folder, toy_int8, toy, {})
    for name in ("export", "convert"):
        stage.play(name)
        out = folder / "out"
        stage.whole[name] = {
            str(f.relative_to(out)): sha256_file(f) for f in out.rglob("*") if f.is_file() and f.name != "manifest.json"
        }
    yield stage
    os.chdir(working)


EARLY = """
from sa3_convert import cli
def interrupted():
    raise KeyboardInterrupt
cli.prepare_standard_streams = interrupted
cli.main(["--version"])
"""


def test_an_interrupt_before_the_command_has_begun_is_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], cwd=ROOT, capture_output=True, text=True, check=False)
    said = "sa3-convert: Interrupted; nothing half-written was left behind.\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", said)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_one_moment(name: str, stage: Stage) -> None:
    took = stage.play(name)
    stage.play(name, signal.SIGTERM, took / 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_any_of_twenty_moments(name: str, number: signal.Signals, stage: Stage) -> None:
    took = stage.play(name)
    for index, seconds in enumerate(moments(20, took, seed=number)):
        stage.play(name, number, seconds, to_all=index % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_kill_leaves_is_swept_by_the_next_command(name: str, stage: Stage) -> None:
    took = stage.play(name)
    for seconds in moments(10, took, seed=9):
        for part in ("out", "cache"):
            shutil.rmtree(stage.folder / part, ignore_errors=True)
        stage.kill(name, seconds)
