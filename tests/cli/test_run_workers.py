"""`run --batch` on workers, as a user gives it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from tests.processes import ended

SHORT = ("--prompt", "pad", "--seconds", "0.5", "--steps", "1", "--engine", "mnn")


@pytest.fixture
def run(toy_int8: Bundle) -> Callable[..., int]:
    return lambda *arguments: cli.run(["run", str(toy_int8.path), *arguments])


def written(folder: Path, *lines: Any) -> Path:
    file = folder / "batch.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_workers_make_what_this_process_makes_and_tell_it_in_the_same_order(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    # Only a seed's low 32 bits count, so the third line's audio is the first one's.
    file = written(tmp_path, {"seed": 1, "output": "a.flac"}, {"seed": 2}, {"seed": 1 + (1 << 32)})
    # As many threads: another number of them adds in another order.
    arguments = ("--batch", file.name, *SHORT, "--threads", "1")
    assert run(*arguments, "-o", "here") == 8
    here = capsys.readouterr()
    assert run(*arguments, "-o", "there", "--workers", "2") == 8
    there = capsys.readouterr()

    def told(out: str) -> list[str]:
        return [line.partition(", ")[0] for line in out.splitlines()]

    assert told(there.out) == told(here.out)
    assert "1 of 3 outputs failed their checks" in there.err
    names = sorted(path.name for path in Path("there").iterdir())
    assert names == ["0002.wav", "a.flac", "results.jsonl"]
    assert [Path("there", name).read_bytes() for name in names[:2]] == [Path("here", n).read_bytes() for n in names[:2]]

    written(tmp_path, {"seed": 1, "output": "a.flac"}, {"seed": 2})
    monkeypatch.setattr("distributed.LocalCluster", None)
    assert run(*arguments, "-o", "there", "--workers", "2") == 0
    assert capsys.readouterr().out.count("done by an earlier run") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--workers", "2", "-o", "x.wav"), "for --batch"),
        (("--scheduler", "tcp://127.0.0.1:1", "-o", "x.wav"), "for --batch"),
        (("--batch", "b.jsonl", "-o", "out", "--workers", "0"), "greater than or equal to 1"),
        (("--batch", "b.jsonl", "-o", "out", "--workers", "2", "--scheduler", "tcp://x:1"), "Give one of them"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    run: Callable[..., int],
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, {"seed": 1}).rename("b.jsonl")
    assert run(*SHORT, *arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.jsonl"]


def test_without_dask_workers_are_refused_with_what_brings_them(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    file = written(tmp_path, {"seed": 1})
    assert run(*SHORT, "--batch", str(file), "-o", str(tmp_path / "out"), "--workers", "2") == 7
    assert "[cluster]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_interrupt_ends_all_workers_and_leaves_no_half_file(toy_int8: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = {"seconds": 60, "steps": 1000}
    file = written(tmp_path, {"seed": 1}, {"seed": 2} | long, {"seed": 3} | long)
    words = ("run", str(toy_int8.path), "--batch", str(file), *SHORT, "--workers", "2", "-o", str(out))
    command = [sys.executable, "-m", "sa3_convert", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    waited = time.monotonic() + 300
    while not (out.is_dir() and any(out.glob(".*.partial"))) or not (out / "0001.wav").exists():
        assert process.poll() is None
        assert time.monotonic() < waited
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert ended(process.pid)
    assert {path.name for path in out.iterdir()} <= {"0001.wav", "results.jsonl"}
