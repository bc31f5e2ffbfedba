import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from sa3_convert.cli import app as cli
from sa3_convert.errors import ConversionError
from sa3_convert.mnn.isolated import run_worker
from sa3_convert.system import log
from sa3_convert.system.log import capture_stdout


@pytest.fixture(autouse=True)
def silent_afterwards() -> Iterator[None]:
    yield
    log.show(False)


def test_nothing_is_printed_without_being_asked(capsys: pytest.CaptureFixture[str]) -> None:
    log.show(False)
    log.note("MNN", ["a line"])
    logging.getLogger("somebody").warning("a warning")
    assert capsys.readouterr() == ("", "")


def test_verbose_prints_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.show(True)
    log.note("MNN", ["a line"])
    logging.getLogger("somebody").warning("a warning")
    assert capsys.readouterr() == ("", "MNN: a line\nsomebody: a warning\n")


def test_what_a_terminal_obeys_is_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    log.show(True)
    log.note("MNN", ["\x1b[2J\x07name"])
    assert capsys.readouterr().err == "MNN: \\x1b[2J\\x07name\n"


def test_what_mnn_prints_is_logged() -> None:
    with log.kept() as lines, capture_stdout():
        os.write(1, b"Can't Find type=2 backend\n")
    assert lines == ["MNN: Can't Find type=2 backend"]


@pytest.mark.parametrize("end", ["", "; raise SystemExit(3)"])
def test_what_a_worker_prints_is_logged_however_it_ends(tmp_path: Path, end: str) -> None:
    program = (sys.executable, "-c", f"print('Start to Convert'){end}")
    with log.kept() as lines:
        try:
            run_worker(["convert"], tmp_path, command=program)
        except ConversionError:
            assert end
    assert lines == ["MNN's converter: Start to Convert"]


def test_warnings_and_a_logger_are_taken_in(capsys: pytest.CaptureFixture[str]) -> None:
    with log.kept() as lines, log.taken_in("torch.onnx"):
        warnings.warn("old form", UserWarning, stacklevel=1)
        logging.getLogger("torch.onnx").warning("not installed")
    assert lines == ["UserWarning: old form", "torch.onnx: not installed"]
    assert capsys.readouterr() == ("", "")


def test_very_much_is_cut() -> None:
    with log.kept() as lines:
        log.note("MNN", ["again"] * 10000)
    assert len(lines) == 2000


def test_the_option_shows_the_log_of_this_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--verbose", "inspect", str(tmp_path / "absent.mnn")]) == 3
    assert log.is_shown()
    assert cli.run(["inspect", str(tmp_path / "absent.mnn")]) == 3
    assert not log.is_shown()
