"""Files that are written whole or not at all: beside, checked, renamed; and that are still what was checked.

What is written next to its final name is locked by the process that writes it, so that a later one can tell what a
killed process has left, and removes it.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Self

from sa3_convert.errors import BundleError, UsageError
from sa3_convert.streams import STANDARD_OUTPUT as STANDARD_OUTPUT
from sa3_convert.streams import is_stream as is_stream
from sa3_convert.streams import opened_stream
from sa3_convert.supervisor import writing_into
from sa3_convert.untrusted import NotAFileError, open_regular

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial", re.DOTALL)
_NAME = 50
"""Characters of the final name in the temporary one, which must not grow too long for the file system."""
_FICLONE = 0x40049409
"""Linux: `ioctl_ficlone(2)`."""
_DESCRIPTORS: Final = Path("/proc/self/fd")
_PATIENCE, _PAUSE = 10.0, 0.01
"""Seconds to wait for another that takes final names, which is a matter of milliseconds."""
_swept: set[Path] = set()
_own: set[Path] = set()
"""Folders under temporary names that this process has made and holds."""
_held: dict[int, Path] = {}
"""Names of the folders that are reached by descriptor."""


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
        with _partial(Path(tempfile.gettempdir()) / "output", _new_private_folder) as folder:
            temporary = folder / "output"
            temporary.touch()
            yield temporary
            with temporary.open("rb") as whole, opened_stream(path) as stream:
                shutil.copyfileobj(whole, stream)
        return
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    with _partial(target, _new_file) as temporary:
        yield temporary
        _sync(temporary)
        temporary.replace(target)


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
                beside.replace(final)
            made.replace(target)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that takes the name `path`, where nothing may stand but an empty folder, if the block ends well.

    Raises:
        UsageError: something else stands there.
        OSError: nothing can be written there.

    """
    check_new_folder(path)
    with partial_folder(path) as temporary:
        yield temporary
        # Over an empty folder this replaces it; had anything been put there meanwhile, it fails.
        temporary.rename(os.path.realpath(path))


@contextlib.contextmanager
def alone_in(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder against all that ask for it in this way; the lock goes with the process, however it ends.

    Raises:
        BlockingIOError: another holds it, and still does after `patience` seconds.

    """
    if folder in _own:
        yield
        return
    with contextlib.ExitStack() as stack:
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise BlockingIOError(errno.EAGAIN, "Something else is writing there", str(folder)) from None
                time.sleep(_PAUSE)
                continue
            except OSError:
                pass  # some network file systems have no locks
            break
        yield


def check_new_folder(path: Path) -> None:
    """Check that a name is free for a folder; see `atomic_folder`."""
    if is_stream(path) or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} is a file. Name a folder that does not exist yet, or is empty.")
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path} is not empty. Name a folder that does not exist yet, or is empty.")


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


def inside(folder: Path, name: str) -> Path:
    """Return the path of `name` within `folder`, links followed.

    Raises:
        BundleError: it would lie outside.

    """
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / name))
    if path == root or not path.is_relative_to(root):
        raise BundleError(f"{name!r} leads out of {named(folder)}. Nothing is read or written there.")
    return path


@dataclass(frozen=True, slots=True)
class FileState:
    """Which bytes a name stood for at a moment: the same state is the same file, and nobody has written to it."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, stream: BinaryIO) -> "FileState":
        """Return the state of an open file."""
        return cls._from(os.fstat(stream.fileno()))

    @classmethod
    def at(cls, path: Path) -> "FileState":
        """Return the state of the file that stands at a path, links followed."""
        return cls._from(path.stat())

    @classmethod
    def _from(cls, found: os.stat_result) -> "FileState":
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class _Descriptor:
    """An open file or folder, closed when nobody holds it any more; until then no other gets its inode."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class HeldFolder:
    """A folder that stays the same while its name comes to lead to another: what is in it is reached by descriptor.

    Where the system has no `/proc` it is reached by name.

    Args:
        path: the folder.

    Raises:
        OSError: there is none.

    """

    def __init__(self, path: Path) -> None:
        self._descriptor = _Descriptor(os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY))
        self.path = path
        by_descriptor = _DESCRIPTORS / str(self._descriptor.number)
        self.root = by_descriptor if by_descriptor.is_dir() else path
        """The path by which what is in it is reached; `named` tells what people call it."""
        if self.root is not path:
            _held[self._descriptor.number] = path
            weakref.finalize(self, _held.pop, self._descriptor.number, None)


def named(path: Path) -> Path:
    """Return the name that people know of a path that may lead through a `HeldFolder`."""
    if path.is_relative_to(_DESCRIPTORS):
        number, *rest = path.relative_to(_DESCRIPTORS).parts
        if number.isdecimal() and int(number) in _held:
            return _held[int(number)].joinpath(*rest)
    return path


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A file whose SHA-256 was taken, and which can be held to that after it was loaded by its name."""

    path: Path
    sha256: str
    state: FileState
    companion: "CheckedFile | None" = None
    """What is loaded with it, by a name made from its own."""
    _held: tuple[object, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def read(cls, path: Path, *, within: HeldFolder | None = None, companion: "CheckedFile | None" = None) -> Self:
        """Read a file once for its SHA-256.

        Args:
            path: the file.
            within: the folder that `path` leads through.
            companion: what belongs to it.

        Raises:
            OSError: it cannot be read, or is no regular file.

        """
        with open_regular(path) as stream:
            # The state before: what is written while the file is read shows later.
            state = FileState.of(stream)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return cls(path, digest, state, companion, (within, _Descriptor(os.dup(stream.fileno()))))

    def require_unchanged(self) -> None:
        """Refuse a file that was replaced, changed or removed since it was read; its companion too.

        Raises:
            BundleError: it was.

        """
        try:
            same = FileState.at(self.path) == self.state
        except OSError:
            same = False
        if not same:
            raise BundleError(f"{named(self.path)} was replaced or changed while it was in use. Run the command again.")
        if self.companion is not None:
            self.companion.require_unchanged()


def sweep(folder: Path) -> None:
    """Remove what processes that are gone have left half-written in a folder; looks once per process and folder."""
    if folder in _swept or not folder.is_dir():
        return
    _swept.add(folder)
    for entry in folder.iterdir():
        if _PARTIAL.fullmatch(entry.name):
            with contextlib.suppress(OSError):
                descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(entry)
                finally:
                    os.close(descriptor)


@contextlib.contextmanager
def _partial(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yield something new beside `target` that this process holds locked; what is left under its name is removed."""
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
                descriptor = os.open(temporary, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                # Some network file systems have no locks; there nothing is swept either.
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.path.samestat(temporary.lstat(), os.fstat(descriptor)):
                    break
            # It was swept before it was locked.
        yield temporary


def _new_file(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))


def _new_private_folder(path: Path) -> None:
    path.mkdir(0o700)


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
    try:
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except OSError:
        return False
    return True
