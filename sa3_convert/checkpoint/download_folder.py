"""The folder in which a download grows until it is whole: one process at a time, and nothing in it but its own files.

It stands beside the target under a name that anyone can foresee, so whatever else lies there, links above all, is
removed before anything is read or written.
"""

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from sa3_convert.errors import UsageError


@contextlib.contextmanager
def download_folder(target: Path) -> Iterator[Path]:
    """Yield the folder for a download to `target`, what an interrupted one left included; held locked meanwhile.

    It is removed when nothing is in it after the block, and stays when it was renamed.

    Raises:
        UsageError: another process downloads to the same target.

    """
    folder = target.with_name(f".{target.name}.download")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        # Some network file systems have no locks.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"Another download to {target} is under way. Wait for it, or end it.") from None
        # The other one may have finished, and renamed it, just before.
        if not _is_open_at(folder, descriptor):
            raise UsageError(f"Another download to {target} has just finished.")
        yield folder
    finally:
        with contextlib.suppress(OSError):
            if _is_open_at(folder, descriptor):
                folder.rmdir()
        os.close(descriptor)


def _is_open_at(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def tidy(folder: Path, keep: Callable[[str], bool]) -> None:
    """Remove all but the files to keep, and those too that are links or have a second name elsewhere.

    Args:
        folder: what `download_folder` gave.
        keep: told each name relative to `folder`, with at most one slash.

    """
    for entry in list(folder.iterdir()):
        if _is_folder(entry) and keep(f"{entry.name}/"):
            for below in list(entry.iterdir()):
                _remove_unless(keep(f"{entry.name}/{below.name}"), below)
        else:
            _remove_unless(keep(entry.name), entry)


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def _remove_unless(wanted: bool, entry: Path) -> None:
    found = entry.lstat()
    if stat.S_ISDIR(found.st_mode):
        shutil.rmtree(entry)
    elif not (wanted and stat.S_ISREG(found.st_mode) and found.st_nlink == 1):
        entry.unlink()
