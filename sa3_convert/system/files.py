"""Files that are written whole or not at all: beside, checked, renamed; and that are still what was checked.

What is written next to its final name is locked by the process that writes it, so that a later one can tell what a
killed process has left, and removes it.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from sa3_convert.errors import UsageError
from sa3_convert.system.streams import is_stream, opened_stream
from sa3_convert.system.supervisor import writing_into
from sa3_convert.system.untrusted import NotAFileError, check_name, open_regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial", re.DOTALL)
_NAME = 16
"""Characters of the final name in the temporary one, which must not grow long: Windows takes 260 for a whole path."""
_FICLONE = 0x40049409
"""Linux: `ioctl_ficlone(2)`."""
_PATIENCE, _PAUSE = 10.0, 0.01
"""Seconds to wait for another that takes final names, which is a matter of milliseconds."""
_AS_IT_IS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_swept: set[Path] = set()
_own: set[Path] = set()
"""Folders under temporary names that this process has made and holds."""


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a regular file's bytes, read in bounded pieces."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the final name only if the block ends without an error.

    A link is followed: what it leads to is replaced. What is written gets the permissions that a new file gets here.
    Into a pipe, a device or standard output the whole is written when the block has ended.

    Raises:
        OSError: nothing can be written there.

    """
    if is_stream(path):
        import tempfile

        with _partial(Path(tempfile.gettempdir()) / "output", functools.partial(Path.mkdir, mode=0o700)) as folder:
            temporary = folder / "output"
            temporary.touch()
            yield temporary
            with temporary.open("rb") as whole, opened_stream(path) as stream:
                shutil.copyfileobj(whole, stream)
        return
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    with _partial(target, functools.partial(Path.touch, exist_ok=False)) as temporary:
        yield temporary
        _sync(temporary)
        take_name(temporary, target)


@contextlib.contextmanager
def atomic_pair(path: Path, suffix: str) -> Iterator[Path]:
    """Yield a path, alone in a new folder, whose file takes the name `path` if the block ends without an error.

    A file that stands beside it then, under its name and `suffix`, belongs to it and comes with it; one of that name
    beside `path` that belonged to an older file is removed. The folder is there to work in.

    Raises:
        OSError: nothing can be written there, or a pipe or a device stands there.

    """
    if is_stream(path):
        raise NotAFileError(errno.EINVAL, "A model may need a second file beside it; name a regular file", str(path))
    target = Path(os.path.realpath(path))
    with partial_folder(target) as folder:
        made = folder / target.name
        yield made
        beside, final = (file.with_name(file.name + suffix) for file in (made, target))
        _sync(made)
        has_second = beside.exists() and beside.stat().st_size > 0
        if has_second:
            _sync(beside)
        # Two at once would leave the first file of one with the second of the other.
        with alone_in(target.parent, _PATIENCE):
            if has_second or final.exists():
                # Without the first file the second is nothing: it goes first and comes last.
                target.unlink(missing_ok=True)
                final.unlink(missing_ok=True)
            if has_second:
                take_name(beside, final)
            take_name(made, target)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a folder that takes the name `path`, where nothing may stand but an empty folder, if the block ends well.

    With `replace` a folder that stands there goes; its new form is whole before it does.

    Raises:
        UsageError: something else stands there.
        OSError: nothing can be written there.

    """
    if not replace:
        check_new_folder(path)
    final = Path(os.path.realpath(path))
    with partial_folder(path) as temporary:
        yield temporary
        if not (replace and final.is_dir()):
            # Had anything been put there meanwhile, it fails.
            take_name(temporary, final)
            return
        with partial_folder(path) as aside:
            old = aside / final.name
            take_name(final, old)
            try:
                take_name(temporary, final)
            except BaseException:
                take_name(old, final)
                raise


def take_name(made: Path, target: Path) -> None:
    """Give what is whole its final name; a file replaces a file, a folder an empty folder.

    Windows refuses while another program has one of the two open, as one that looks for viruses does for a moment: it
    is asked again for some seconds.

    Raises:
        OSError: something else stands there, or is in use.

    """
    deadline = time.monotonic() + (_PATIENCE if fcntl is None else 0)
    while True:
        try:
            if made.is_dir():
                with contextlib.suppress(FileNotFoundError):
                    target.rmdir()
            made.replace(target)
            return
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_PAUSE)


@contextlib.contextmanager
def alone_in(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder against all that ask for it in this way; the lock goes with the process, however it ends.

    Raises:
        BlockingIOError: another holds it, and still does after `patience` seconds.
        OSError: it is not there.

    """
    if folder in _own:
        yield
        return
    with _held(Path(os.path.realpath(folder)), patience):
        yield


@contextlib.contextmanager
def _held(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Hold a file or folder, and yield whether that was possible: some network file systems have no locks.

    It is locked itself where the system can do that, so that nothing is left of the lock, and else a file beside it.

    Raises:
        BlockingIOError: see `alone_in`.
        FileNotFoundError: it is not there, or not any more when it is locked.

    """
    if fcntl is None:
        with _held_by_file(path, patience) as held:
            yield held
        return
    descriptor = os.open(path, os.O_RDONLY | _AS_IT_IS)
    try:
        held, deadline = False, time.monotonic() + patience
        while not held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise _busy(path) from None
                time.sleep(_PAUSE)
            except OSError:
                break
        if not os.path.samestat(path.lstat(), os.fstat(descriptor)):
            raise FileNotFoundError(errno.ENOENT, "Another took its place", str(path))
        yield held
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _held_by_file(path: Path, patience: float) -> Iterator[bool]:
    import filelock

    file = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        held = True
        try:
            stack.enter_context(filelock.FileLock(file, timeout=patience, poll_interval=_PAUSE))
        except filelock.Timeout:
            raise _busy(path) from None
        except OSError:
            held = False
        try:
            path.lstat()
            yield held
        finally:
            stack.close()
            # Where there is no flock, what another holds open cannot be removed.
            with contextlib.suppress(OSError):
                file.unlink()


def _busy(path: Path) -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, "Something else is writing there", str(path))


def check_new_folder(path: Path) -> None:
    """Check that a name is free for a folder; see `atomic_folder`."""
    check_name(path)
    if is_stream(path) or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} is a file. Name a folder that does not exist yet, or is empty.")
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path} is not empty. Name a folder that does not exist yet, or is empty.")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise UsageError unless so many bytes more find room in a folder, whose parent is what users know."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"{what} needs {needed / 2**30:.1f} GiB more, {folder.parent} has {free / 2**30:.1f} GiB left. "
            "Make room or give a folder on another disk."
        )


@contextlib.contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, under a temporary name, that is gone after the block unless it was renamed."""
    with _partial(Path(os.path.realpath(path)), Path.mkdir) as temporary:
        _own.add(temporary)
        try:
            yield temporary
        finally:
            _own.discard(temporary)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the whole new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def copy_file(source: Path, target: Path) -> None:
    """Put a copy of `source` under `target`'s name: sharing blocks where the file system can, never an inode.

    So neither a later change of the copy nor of its permissions reaches the source.
    """
    with atomic_path(target) as temporary, open_regular(source) as given, temporary.open("rb+") as stream:
        if not _cloned(given, stream):
            shutil.copyfileobj(given, stream, 1 << 20)


def sweep(folder: Path) -> None:
    """Remove what processes that are gone have left half-written in a folder; looks once per process and folder."""
    if folder in _swept or not folder.is_dir():
        return
    _swept.add(folder)
    for entry in folder.iterdir():
        if _PARTIAL.fullmatch(entry.name):
            with contextlib.suppress(OSError), _held(entry) as held:
                if held:
                    _remove(entry)


@contextlib.contextmanager
def _partial(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yield something new beside `target` that this process holds locked; what is left under its name is removed."""
    check_name(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    writing_into(target.parent)
    with contextlib.ExitStack() as stack:
        while True:
            # The name is known before the file exists, so there is no moment at which an interrupt leaves it behind.
            temporary = target.with_name(f".{target.name[:_NAME]}.{secrets.token_hex(8)}.partial")
            stack.callback(_remove, temporary)
            make(temporary)
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(_held(temporary, _PATIENCE))
                break
            # It was swept before it was locked.
        yield temporary


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _cloned(source: BinaryIO, target: BinaryIO) -> bool:
    """Let two files share their blocks until one of them changes; tell whether the file system could."""
    if fcntl is None:
        return False
    try:
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except OSError:
        return False
    return True
