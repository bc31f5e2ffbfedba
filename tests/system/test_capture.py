"""Text that a native library writes to standard output is held back, read, and never lost or mixed up."""

import ctypes
import os
import subprocess
import sys
import threading

import pytest

from sa3_convert.system.log import capture_stderr, capture_stdout

C = ctypes.CDLL(None)


def test_what_c_code_prints_is_captured_and_what_comes_after_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    with capture_stdout() as captured:
        C.puts(b"from C")
        os.write(1, b"from the descriptor\n")
    os.write(1, b"after\n")
    assert captured.lines == ("from the descriptor", "from C") or captured.lines == ("from C", "from the descriptor")
    assert capfd.readouterr().out == "after\n"


def test_what_was_still_buffered_goes_where_it_belongs(capfd: pytest.CaptureFixture[str]) -> None:
    C.puts(b"before")
    sys.stdout.write("also before\n")
    with capture_stdout() as captured:
        pass
    assert captured.text == ""
    assert capfd.readouterr().out.splitlines() in (["before", "also before"], ["also before", "before"])


def test_each_block_sees_its_own_text(capfd: pytest.CaptureFixture[str]) -> None:
    with capture_stdout() as outer:
        os.write(1, b"one\n")
        with capture_stdout() as inner:
            os.write(1, b"two\n")
        os.write(1, b"three\n")
    assert inner.lines == ("two",)
    assert outer.lines == ("one", "two", "three")
    with capture_stdout() as later:
        os.write(1, b"four\n")
    assert later.lines == ("four",)
    assert capfd.readouterr().out == ""


def test_standard_error_is_captured_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    with capture_stderr() as captured:
        os.write(2, b"wrong\n")
        os.write(1, b"right\n")
    os.write(2, b"after\n")
    assert captured.lines == ("wrong",)
    assert capfd.readouterr() == ("right\n", "after\n")


def fail_after_writing() -> None:
    with capture_stdout():
        os.write(1, b"inside\n")
        raise KeyError


def test_standard_output_is_put_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError):
        fail_after_writing()
    os.write(1, b"outside\n")
    assert capfd.readouterr().out == "outside\n"


def test_overlapping_blocks_in_threads_all_end_with_standard_output_in_place(capfd: pytest.CaptureFixture[str]) -> None:
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(50):
            with capture_stdout() as captured:
                os.write(1, b"x\n")
            assert "x" in captured.lines

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(1, b"end\n")
    assert capfd.readouterr().out == "end\n"


def test_a_process_without_standard_output_works_too() -> None:
    code = (
        "import os, sys; os.close(1)\n"
        "from sa3_convert.system.log import capture_stdout\n"
        "with capture_stdout() as captured: pass\n"
        "sys.exit(0 if captured.text == '' else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.PIPE).stderr == b""
