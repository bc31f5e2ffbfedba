"""A file is whole under its name, or not there."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import sa3_convert.system.files as files
from sa3_convert.errors import BundleError, UsageError
from sa3_convert.system import checked_files
from sa3_convert.system.checked_files import CheckedFile, HeldFolder, inside, named
from sa3_convert.system.files import (
    atomic_folder,
    atomic_pair,
    atomic_path,
    copy_file,
    partial_folder,
    sha256_file,
    write_text,
)
from sa3_convert.system.untrusted import NotAFileError


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


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_what_is_written_gets_the_permissions_of_a_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file.txt", "text")
        with partial_folder(tmp_path / "folder") as temporary:
            temporary.rename(tmp_path / "folder")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def test_a_copy_shares_neither_content_nor_permissions_with_its_source(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"weights" * 100_000)
    source.chmod(0o400)
    before = source.stat()
    copy_file(source, target)
    assert sha256_file(target) == sha256_file(source)
    target.chmod(0o644)
    target.write_bytes(b"edited")
    assert (source.stat().st_mode, source.stat().st_ctime_ns) == (before.st_mode, before.st_ctime_ns)
    assert source.read_bytes() == b"weights" * 100_000


def test_a_copy_of_a_link_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "link").symlink_to("blob")
    copy_file(tmp_path / "link", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").read_bytes() == b"weights"


def test_a_link_is_followed_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("elsewhere/real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "elsewhere" / "real.txt").read_text() == "new"


def test_a_link_that_leads_nowhere_yet_is_given_its_file(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to("new.txt")
    write_text(tmp_path / "link.txt", "text")
    assert (tmp_path / "new.txt").read_text() == "text"


def test_a_pipe_gets_the_whole_text_and_stays_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "whole")
    reader.join()
    assert read == ["whole"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_device_is_written_to(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "text")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_what_a_killed_process_left_is_swept_by_the_next_that_writes_there(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path\n"
        "from sa3_convert.system.files import atomic_path, partial_folder\n"
        "with atomic_path(Path('a.wav')), partial_folder(Path('b')) as folder:\n"
        "    (folder / 'inside').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert len(list(tmp_path.iterdir())) == 2
    write_text(tmp_path / "other.txt", "text")
    assert [file.name for file in tmp_path.iterdir()] == ["other.txt"]


def test_what_is_being_written_is_not_swept(tmp_path: Path) -> None:
    code = "from pathlib import Path; from sa3_convert.system.files import write_text; write_text(Path('b.txt'), 'b')"
    with atomic_path(tmp_path / "a.txt") as temporary:
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
        temporary.write_text("a")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "a", "b.txt": "b"}


def test_files_of_others_are_not_swept(tmp_path: Path) -> None:
    for name in (".a.partial", "a.0123456789abcdef.partial", ".a.0123456789abcdeg.partial"):
        (tmp_path / name).touch()
    write_text(tmp_path / "text", "")
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("swept_after", ["made", "opened"])
def test_what_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swept_after: str
) -> None:
    made: list[Path] = []
    make, lock = Path.touch, files.fcntl.flock

    def made_and_swept(path: Path, *, exist_ok: bool) -> None:
        make(path, exist_ok=exist_ok)
        made.append(path)
        if len(made) == 1 and swept_after == "made":
            path.unlink()

    def locked_too_late(descriptor: int, operation: int) -> None:
        if len(made) == 1 and swept_after == "opened":
            made[0].unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(Path, "touch", made_and_swept)
    monkeypatch.setattr(files.fcntl, "flock", locked_too_late)
    write_text(tmp_path / "text", "whole")
    assert len(made) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["text"]


def test_what_a_killed_process_left_for_a_pipe_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, signal; from pathlib import Path\n"
        "from sa3_convert.system.files import atomic_path\n"
        "with atomic_path(Path('-')):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    (left,) = tmp_path.iterdir()
    assert stat.S_IMODE(left.stat().st_mode) == 0o700
    write = "from pathlib import Path; from sa3_convert.system.files import write_text; write_text(Path('-'), 'text')"
    done = subprocess.run([sys.executable, "-c", write], env=environment, capture_output=True, check=True)
    assert done.stdout == b"text"
    assert list(tmp_path.iterdir()) == []


def pair(path: Path, first: str, second: str | None) -> None:
    with atomic_pair(path, ".data") as made:
        made.write_text(first)
        made.with_name("scratch").touch()
        if second is not None:
            made.with_name(f"{made.name}.data").write_text(second)


def test_a_pair_of_files_is_replaced_together(tmp_path: Path) -> None:
    contents = [("one", "weights"), ("two", "more weights"), ("three", None), ("four", ""), ("five", "weights")]
    for first, second in contents:
        pair(tmp_path / "model", first, second)
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
            "model": first,
            **({"model.data": second} if second else {}),
        }


def test_a_pair_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_pair(tmp_path / "model", ".data") as made:
            made.write_text("half")
            raise KeyboardInterrupt

    pair(tmp_path / "model", "old", "weights")
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"model": "old", "model.data": "weights"}


def test_pairs_to_one_name_at_once_leave_both_files_of_one(tmp_path: Path) -> None:
    def write(begin: threading.Barrier, stamp: str) -> None:
        with atomic_pair(tmp_path / "model", ".data") as made:
            made.write_text(stamp)
            made.with_name("model.data").write_text(stamp)
            begin.wait()

    for _ in range(100):
        begin = threading.Barrier(3)
        threads = [threading.Thread(target=write, args=(begin, stamp)) for stamp in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (tmp_path / "model").read_text() == (tmp_path / "model.data").read_text()


def test_a_folder_that_another_holds_is_waited_for_and_then_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    with files.alone_in(tmp_path), pytest.raises(BlockingIOError, match="Something else is writing there"):
        pair(tmp_path / "model", "new", "weights")
    assert list(tmp_path.iterdir()) == []


def test_a_pair_follows_links_and_goes_into_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/model")
    pair(tmp_path / "link", "new", "weights")
    assert {file.name for file in (tmp_path / "elsewhere").iterdir()} == {"model", "model.data"}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotAFileError):
        pair(tmp_path / "pipe", "new", None)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def folder(path: Path) -> None:
    with atomic_folder(path) as made:
        (made / "file").touch()


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    for name in ("new", "empty", "link", "deep/new"):
        folder(tmp_path / name)
        assert (tmp_path / name / "file").is_file()
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name", ["file", "pipe", "full"])
def test_a_folder_replaces_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    folder(tmp_path / "full")
    before = (tmp_path / name).stat()
    with pytest.raises(UsageError, match="does not exist yet, or is empty"):
        folder(tmp_path / name)
    assert (tmp_path / name).stat() == before


def test_a_name_as_long_as_the_file_system_takes_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "text")
    assert [file.name for file in tmp_path.iterdir()] == ["n" * 255]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", ".", "link/x", "a/b/../../.."])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="leads out of"):
        inside(folder, name)


def test_a_name_inside_its_folder_is_taken(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b.txt") == Path(os.path.realpath(tmp_path)) / "a" / "b.txt"


@pytest.mark.parametrize("change", ["replace", "write", "remove", "same"])
def test_a_checked_file_that_is_another_now_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "model.mnn"
    path.write_bytes(b"first")
    checked = CheckedFile.read(path)
    checked.require_unchanged()
    if change == "replace":
        write_text(path, "other")
    elif change == "write":
        path.write_bytes(b"other")
    elif change == "remove":
        path.unlink()
    else:
        copy_file(path, path.with_name("copy"))
        path.with_name("copy").replace(path)
    with pytest.raises(BundleError, match="replaced or changed"):
        checked.require_unchanged()


def test_a_held_folder_stays_the_same_and_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "x").write_text("1")
    held = HeldFolder(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "x").write_text("2")
    assert (held.root / "x").read_text() == "1"
    assert named(held.root / "x") == tmp_path / "first" / "x"
    with pytest.raises(BundleError, match=f"leads out of {tmp_path}/first"):
        inside(held.root, "../moved")


def test_descriptors_are_closed_when_nobody_holds_them(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("1")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        held = HeldFolder(tmp_path)
        CheckedFile.read(held.root / "x", within=held).require_unchanged()
    del held
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_companion_that_changed_is_told_by_its_own_name(tmp_path: Path) -> None:
    for name in ("x", "x.weight"):
        (tmp_path / name).write_text("1")
    file = CheckedFile.read(tmp_path / "x", companion=CheckedFile.read(tmp_path / "x.weight"))
    file.require_unchanged()
    (tmp_path / "x.weight").write_text("22")
    with pytest.raises(BundleError, match=r"x\.weight was replaced or changed"):
        file.require_unchanged()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_pairs_and_folders_get_the_permissions_of_new_ones(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        pair(tmp_path / "model", "new", "weights")
        folder(tmp_path / "folder")
    finally:
        os.umask(before)
    for name in ("model", "model.data", "folder/file"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def test_a_pair_can_be_made_in_a_folder_that_is_being_made(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new") as folder, atomic_pair(folder / "m.mnn", ".weight") as made:
        made.write_text("model")
    assert (tmp_path / "new" / "m.mnn").read_text() == "model"


def test_a_descriptor_that_an_interrupt_kept_from_its_number_goes_in_silence() -> None:
    # What an interrupt leaves between the making of an object and its first statement.
    unfinished = checked_files._Descriptor.__new__(checked_files._Descriptor)
    unfinished.__del__()
