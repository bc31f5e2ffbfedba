"""What the outermost frame makes of errors that are not the project's own."""

import errno
import re

import pytest

from sa3_convert.cli.app import run

TORCH = (
    "[enforce fail at alloc_cpu.cpp:130] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 4, "Out of memory"),
        (RuntimeError(TORCH), 4, "Out of memory"),
        (RuntimeError("std::bad_alloc"), 4, "Out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 4, "Out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 3, "disk is full.*'/x/y'"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 3, "The system refused.*'/x/y'"),
        (RuntimeError("shapes differ"), 70, "This is a bug in sa3-convert: RuntimeError: shapes differ"),
    ],
)
def test_an_error_of_the_system_is_told_apart_from_a_bug(
    error: Exception, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("sa3_convert.cli.app.app", fails)
    assert run(["inspect", "x.mnn"]) == code
    message = capsys.readouterr().err
    assert len(message.splitlines()) <= 2
    assert re.search(words, message)
