"""A file is whole under its name, or not there."""

import os
from pathlib import Path

import pytest

from sa3_convert.files import atomic_path, link_or_copy, sha256_file, write_text


def test_the_file_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    def fail_half_way() -> None:
        with atomic_path(tmp_path / "file.txt") as temporary:
            temporary.write_text("half")
            raise error

    write_text(tmp_path / "file.txt", "old")
    with pytest.raises(error):
        fail_half_way()
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "old"


def test_an_interrupt_at_the_moment_of_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = os.close

    def interrupted(descriptor: int) -> None:
        close(descriptor)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "file.txt"):
        raise AssertionError("the block must not be reached")
    assert list(tmp_path.iterdir()) == []


def test_a_link_has_the_same_content(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"weights")
    link_or_copy(tmp_path / "source", tmp_path / "target")
    assert sha256_file(tmp_path / "target") == sha256_file(tmp_path / "source")


def test_where_links_are_not_possible_the_content_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another device")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_bytes(b"weights")
    link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"weights"
    assert (tmp_path / "target").stat().st_nlink == 1
