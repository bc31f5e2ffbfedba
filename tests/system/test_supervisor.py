"""A command whose process dies, hangs or is asked to stop ends with a code and a sentence."""

import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sa3_convert.system.shared_page import Page
from sa3_convert.system.supervisor import working_on

_PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from sa3_convert.cli import main
from sa3_convert.system.supervisor import working_on
import sa3_convert.cli.app as app
def run(arguments):
    Path("child").write_text(str(os.getpid()))
{body}
app.run = run
main(sys.argv[1:])
"""
_HELD = "with working_on('model.mnn'):"


def program(body: str) -> list[str]:
    return [sys.executable, "-c", _PROGRAM.format(body=textwrap.indent(body, "    "))]


def started(body: str, folder: Path, ignore: tuple[signal.Signals, ...] = ()) -> subprocess.Popen[str]:
    """Start a command in a process group of its own and wait until its child runs."""

    def as_from_a_shell() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignore else signal.SIG_DFL)

    running = subprocess.Popen(
        program(body),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=as_from_a_shell,
    )
    wait_for(lambda: running.poll() is not None or (folder / "child").exists())
    return running


def ended(body: str, folder: Path) -> tuple[int, str]:
    running = started(body, folder)
    _, complaint = running.communicate(timeout=60)
    return running.returncode, complaint


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lives(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("code", [0, 3, 70])
def test_an_exit_code_passes_through(code: int, tmp_path: Path) -> None:
    assert ended(f"return {code}", tmp_path) == (code, "")


@pytest.mark.parametrize("fault", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"])
def test_a_crash_names_the_file_that_was_in_hand(fault: str, tmp_path: Path) -> None:
    code, complaint = ended(f"{_HELD} os.kill(os.getpid(), signal.{fault})", tmp_path)
    assert code == 3
    assert complaint.startswith(f"sa3-convert: model.mnn was in use when {fault} ended the command")
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("spoilt", ["b'\\xff' * 4096", "struct.pack('d', math.inf)", "struct.pack('d', -1.0)"])
def test_a_page_that_the_child_has_spoilt_is_no_trouble(spoilt: str, tmp_path: Path) -> None:
    spoil = f"data = {spoilt}\nsupervisor._page._memory[: len(data)] = data\nos.write(supervisor._page.wakes, b'x')"
    head = "import math, struct\nfrom sa3_convert.system import supervisor\n"
    code, complaint = ended(f"{head}{_HELD}\n    pass\n{spoil}\ntime.sleep(0.2)\nos.abort()", tmp_path)
    assert code in (3, 4)
    assert complaint.startswith("sa3-convert: ")
    assert "Traceback" not in complaint


def test_a_name_cannot_control_the_terminal(tmp_path: Path) -> None:
    code, complaint = ended(r"with working_on('\x1b[31m.mnn'): os.abort()", tmp_path)
    assert (code, r"\x1b[31m.mnn was in use" in complaint) == (3, True)


def test_a_crash_a_little_later_names_the_last_file(tmp_path: Path) -> None:
    code, complaint = ended(f"{_HELD} pass\nos.abort()", tmp_path)
    assert (code, "model.mnn was the last file" in complaint) == (3, True)


def test_a_crash_with_two_files_in_hand_names_both(tmp_path: Path) -> None:
    code, complaint = ended("with working_on('a.mnn'), working_on('b.mnn'): os.abort()", tmp_path)
    assert (code, "a.mnn or b.mnn was in use" in complaint) == (3, True)


def test_a_crash_with_no_file_is_a_library_s_fault(tmp_path: Path) -> None:
    code, complaint = ended("os.abort()", tmp_path)
    assert (code, "A native library ended the command with SIGABRT" in complaint) == (4, True)


def test_a_kill_is_out_of_memory_and_says_in_what(tmp_path: Path) -> None:
    code, complaint = ended(f"{_HELD} os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert (code, "killed while it worked with model.mnn" in complaint) == (4, True)


def test_a_file_that_takes_longer_than_its_limit_is_given_up(tmp_path: Path) -> None:
    before = time.monotonic()
    code, complaint = ended("with working_on('tokenizer.json', seconds=0.3): time.sleep(60)", tmp_path)
    assert (code, "tokenizer.json took far longer" in complaint) == (3, True)
    assert time.monotonic() - before < 20


def test_a_page_that_is_copied_while_it_is_written_is_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page()
    empty = page._memory[:]
    page.take("tokenizer.json", 30.0)
    # The lower half of a deadline and the upper one of none: long past, though nothing is in hand.
    torn = page._memory[:4] + empty[4:]
    assert 0 < struct.unpack_from("d", torn)[0] < 1e-300
    monkeypatch.setattr(page, "_memory", Copies([torn, empty, empty]))
    assert page.read().deadline == 0


class Copies:
    """Memory that gives one copy after the other."""

    def __init__(self, copies: list[bytes]) -> None:
        self._copies = copies

    def __getitem__(self, part: slice) -> bytes:
        return self._copies.pop(0)[part]


def test_a_file_that_takes_more_memory_than_its_limit_fails_to_get_it(tmp_path: Path) -> None:
    body = "with working_on('tokenizer.json', room=1 << 28): bytearray(1 << 29)"
    code, complaint = ended(f"bytearray(1 << 29)\ntry:\n    {body}\nexcept MemoryError: return 3", tmp_path)
    assert (code, complaint) == (3, "")
    assert ended("with working_on('x', room=1 << 28): pass\nbytearray(1 << 29)\nreturn 0", tmp_path) == (0, "")


def test_a_limit_ends_with_its_block(tmp_path: Path) -> None:
    assert ended("with working_on('x', seconds=0.1): pass\ntime.sleep(0.5)\nreturn 0", tmp_path) == (0, "")


def test_a_crash_leaves_nothing_half_written(tmp_path: Path) -> None:
    body = "from sa3_convert.system.files import atomic_path\nwith atomic_path(Path('out/x.wav')): os.abort()"
    assert ended(body, tmp_path)[0] == 4
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "word"), [("INT", 130, "Inter"), ("TERM", 143, "Termi"), ("HUP", 129, "Termi")]
)
@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_is_raised_once_and_all_is_cleaned_up(
    number: str, code: int, word: str, to_all: bool, tmp_path: Path
) -> None:
    body = """
from sa3_convert.system.files import atomic_path
with atomic_path(Path("out/x.wav")):
    try:
        Path("begun").touch()
        time.sleep(60)
    finally:
        time.sleep(0.2)
        Path("cleaned").touch()
"""
    running = started(body, tmp_path)
    wait_for((tmp_path / "begun").exists)
    (os.killpg if to_all else os.kill)(running.pid, getattr(signal, f"SIG{number}"))
    out, complaint = running.communicate(timeout=60)
    assert (running.returncode, out) == (code, "")
    assert complaint.startswith(f"sa3-convert: {word}")
    assert complaint.endswith("ted; nothing half-written was left behind.\n")
    assert (tmp_path / "cleaned").exists()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_signal_waits_for_the_end_of_an_import(tmp_path: Path) -> None:
    """Native modules abort when what they import is interrupted."""
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.7)\nopen('imported', 'w').close()\n")
    running = started("sys.path.insert(0, '')\nimport slow\ntime.sleep(60)", tmp_path)
    running.terminate()
    assert "Terminated; nothing" in running.communicate(timeout=60)[1]
    assert running.returncode == 143
    assert (tmp_path / "imported").exists()


def test_a_signal_in_a_finaliser_is_not_lost(tmp_path: Path) -> None:
    body = """
class Finalised:
    def __del__(self):
        Path("begun").touch()
        time.sleep(1)
one = Finalised()
del one
time.sleep(60)
"""
    running = started(body, tmp_path)
    wait_for((tmp_path / "begun").exists)
    running.terminate()
    assert running.communicate(timeout=30)[1] == "sa3-convert: Terminated; nothing half-written was left behind.\n"
    assert running.returncode == 143


def test_a_library_that_dies_of_a_signal_that_was_passed_on_is_no_crash(tmp_path: Path) -> None:
    running = started("try:\n    time.sleep(60)\nfinally: os.abort()", tmp_path)
    running.terminate()
    assert running.communicate(timeout=60)[1].startswith("sa3-convert: Terminated; nothing")
    assert running.returncode == 143


def test_a_second_signal_ends_what_does_not_end(tmp_path: Path) -> None:
    body = """
from sa3_convert.system.files import atomic_path
with atomic_path(Path("out/x.wav")):
    try:
        Path("begun").touch()
        time.sleep(60)
    finally:
        Path("asked").touch()
        time.sleep(60)
"""
    running = started(body, tmp_path)
    wait_for((tmp_path / "begun").exists)
    running.terminate()
    wait_for((tmp_path / "asked").exists)
    time.sleep(0.6)
    running.terminate()
    assert "Ended at once" in running.communicate(timeout=20)[1]
    assert running.returncode == 143
    assert list((tmp_path / "out").iterdir()) == []
    assert not lives(int((tmp_path / "child").read_text()))


def test_a_killed_parent_takes_its_child_with_it(tmp_path: Path) -> None:
    running = started("time.sleep(60)", tmp_path)
    wait_for(lambda: bool((tmp_path / "child").read_text()))
    child = int((tmp_path / "child").read_text())
    assert lives(child)
    running.kill()
    running.communicate()
    wait_for(lambda: not lives(child))


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(tmp_path: Path) -> None:
    running = started("time.sleep(1)\nreturn 0", tmp_path, ignore=(signal.SIGHUP,))
    os.killpg(running.pid, signal.SIGHUP)
    assert running.communicate(timeout=60) == ("", "")
    assert running.returncode == 0


def test_a_signal_that_nobody_handles_ends_both_as_it_would_one(tmp_path: Path) -> None:
    assert ended("os.kill(os.getpid(), signal.SIGUSR1)\ntime.sleep(9)", tmp_path)[0] == -signal.SIGUSR1


def test_a_stopped_command_goes_on(tmp_path: Path) -> None:
    running = started("time.sleep(0.5)\nreturn 0", tmp_path)
    os.killpg(running.pid, signal.SIGSTOP)
    time.sleep(1)
    assert running.poll() is None
    os.killpg(running.pid, signal.SIGCONT)
    assert running.wait(timeout=30) == 0


def test_without_a_parent_nothing_is_noted(tmp_path: Path) -> None:
    with working_on(tmp_path / "x", seconds=0.0):
        pass
