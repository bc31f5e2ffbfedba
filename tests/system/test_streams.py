"""What is no regular file is written to and stays what it is; a standard stream may be closed or lose its reader."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa3_convert.system.files import write_text
from sa3_convert.system.streams import STANDARD_OUTPUT, check_stream, descriptor_of, identity, is_stream

WRITE = "from pathlib import Path; from sa3_convert.system.files import write_text; write_text(Path({name!r}), 'text')"
NAMES = ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/proc/thread-self/fd/1", "LINK", "UP"]
PREPARED = "import os, sys; from sa3_convert.system.streams import *; prepare_standard_streams(); "


def ran(code: str, redirected: str = "", **options: str) -> subprocess.CompletedProcess[str]:
    """Run Python code under a shell that redirects it."""
    command = ["bash", "-c", f'"$0" -c "$1" {redirected}', sys.executable, code]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_standard_output_adds_to_what_was_written_before(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    name = {"LINK": str(tmp_path / "link"), "UP": "/dev/../dev/fd/1"}.get(name, name)
    log = tmp_path / "log"
    log.write_text("first\n")
    code = f"print('before'); {WRITE.format(name=name)}; print('after')"
    done = ran(code, f">> {log}")
    assert (done.returncode, done.stderr) == (0, "")
    assert log.read_text() == "first\nbefore\ntextafter\n"


def test_a_descriptor_of_another_number_is_written_to(tmp_path: Path) -> None:
    assert ran(WRITE.format(name="/dev/fd/3"), f"3> {tmp_path / 'three'}").returncode == 0
    assert (tmp_path / "three").read_text() == "text"


def test_an_open_file_of_another_process_is_not_replaced(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        code = WRITE.format(name=f"/proc/{os.getpid()}/fd/{stream.fileno()}")
        subprocess.run([sys.executable, "-c", code], check=True)
        assert os.path.samestat(os.fstat(stream.fileno()), (tmp_path / "log").stat())
    assert (tmp_path / "log").read_text() == "text"


def test_files_and_folders_are_no_streams(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "file", tmp_path / "absent", tmp_path / "loop", tmp_path / "absent" / "1"):
        assert not is_stream(path)
        assert descriptor_of(path) is None


def test_names_of_one_thing_have_one_identity_and_what_is_thrown_away_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "hard").hardlink_to(tmp_path / "file")
    assert identity(tmp_path / "file") == identity(tmp_path / "hard") is not None
    assert identity(Path(os.devnull)) is identity(tmp_path / "absent") is None
    assert identity(STANDARD_OUTPUT) == identity(Path("/dev/stdout"))


def test_a_stream_that_cannot_be_written_is_told_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open() as reading, pytest.raises(OSError, match="reading alone"):
        check_stream(Path(f"/dev/fd/{reading.fileno()}"))
    with pytest.raises(OSError, match="It is closed"):
        check_stream(Path("/dev/fd/987"))


def test_what_is_printed_goes_to_standard_error_while_output_is_claimed() -> None:
    code = (
        "import ctypes; from pathlib import Path; from sa3_convert.system.files import write_text; print('before');"
        "claim_standard_output(); print('printed'); ctypes.CDLL(None).puts(b'of a native library');"
        "write_text(Path('/dev/stdout'), 'asked for\\n'); claim_standard_output(); release_standard_output();"
        "release_standard_output(); print('after')"
    )
    done = ran(PREPARED + code)
    assert (done.returncode, done.stdout) == (0, "before\nasked for\nafter\n")
    assert sorted(done.stderr.splitlines()) == ["of a native library", "printed"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_filled_so_that_no_file_becomes_it(tmp_path: Path, closed: str) -> None:
    code = (
        PREPARED + f"import ctypes; kept = open({str(tmp_path / 'file')!r}, 'w'); print('lost'); sys.stderr.write('x');"
        "os.write(2, b'') if 0 else None; ctypes.CDLL(None).puts(b'native'); ctypes.CDLL(None).fflush(None);"
        "kept.write(str(kept.fileno() > 2)); kept.close(); sys.stdout.isatty(); sys.exit(anything_unheard())"
    )
    assert ran(code, closed).returncode == 0
    assert (tmp_path / "file").read_text() == "True"


def test_output_that_was_asked_for_is_not_lost_in_silence_where_standard_output_is_closed() -> None:
    done = ran(PREPARED + "from pathlib import Path; check_stream(Path('-'))", ">&-")
    assert done.returncode == 1
    assert "It is closed" in done.stderr
    done = ran(PREPARED + WRITE.format(name="-"), ">&-")
    assert "Bad file descriptor" in done.stderr


@pytest.mark.parametrize("pipe", ["| true", "2>&1 | true"])
def test_work_goes_on_when_nobody_reads_any_more(tmp_path: Path, pipe: str) -> None:
    code = (
        PREPARED + "import time; time.sleep(0.5)\n"
        "for _ in range(3): print('x' * 100_000, flush=True); print('y', file=sys.stderr, flush=True)\n"
        f"open({str(tmp_path / 'done')!r}, 'w').write(str(anything_unheard()))"
    )
    assert ran(code, pipe).stderr == ("" if "2>" in pipe else "y\n" * 3)
    assert (tmp_path / "done").read_text() == "True"


def test_a_full_disk_is_told_once_and_not_again_at_the_end() -> None:
    done = ran(PREPARED + "print('x' * 100_000)", "> /dev/full")
    assert done.returncode == 1
    assert done.stderr.count("No space left") == 1


def test_what_cannot_be_encoded_is_escaped() -> None:
    done = ran(PREPARED + r"print('\udcff ≥')", "", env=os.environ | {"PYTHONIOENCODING": "ascii"})  # type: ignore[arg-type]
    assert (done.returncode, done.stdout) == (0, "\\udcff \\u2265\n")


def test_a_pipe_that_nobody_reads_is_an_error_where_output_was_asked_for() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with pytest.raises(BrokenPipeError):
            write_text(Path(f"/dev/fd/{writer}"), "text")
    finally:
        os.close(writer)
