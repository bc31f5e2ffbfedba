"""Files that are still what was checked: held by descriptor, inside their folder, asked again when loaded."""

import errno
import hashlib
import os
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Self

from sa3_convert.errors import BundleError
from sa3_convert.system.untrusted import open_regular

_DESCRIPTORS: Final = Path("/proc/self/fd")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_CACHED: Final = re.compile(r"models--[^-].*--.+")
_held: dict[int, Path] = {}
"""Names of the folders that are reached by descriptor."""


def inside(folder: Path, name: str) -> Path:
    """Return the path of `name` within `folder`, links followed; see `cached_repository` for the one way out.

    Raises:
        BundleError: it would lie outside.

    """
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / name))
    is_inside = path.is_relative_to(root) or (
        (repository := cached_repository(root)) is not None and path.parent == repository / "blobs"
    )
    if path == root or not is_inside:
        raise BundleError(f"{name!r} leads out of {named(folder)}. Nothing is read or written there.")
    return path


def cached_repository(folder: Path) -> Path | None:
    """Return the folder of the hub's cache to which a folder of one commit, or one below it, belongs; None for others.

    A commit's files are links there, to `blobs` in the folder that is returned.
    """
    folder = Path(os.path.realpath(folder))
    for commit in (folder, *folder.parents):
        repository = commit.parent.parent
        if commit.parent.name == "snapshots" and _CACHED.fullmatch(repository.name) and _COMMIT.fullmatch(commit.name):
            return repository
    return None


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

    number = -1
    """Until it has one: an interrupt may come before."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class HeldFolder:
    """A folder that stays the same while its name comes to lead to another: what is in it is reached by descriptor.

    Where the system has no `/proc` it is reached by name, and nothing in it is held open: on Windows nobody, not even
    this process, could replace it.

    Args:
        path: the folder.
        name: what people call it, where that is another path.

    Raises:
        OSError: there is none.

    """

    def __init__(self, path: Path, name: Path | None = None) -> None:
        self.path = path if name is None else name
        self.root = path
        """The path by which what is in it is reached; `named` tells what people call it."""
        if not _DESCRIPTORS.is_dir():
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "There is no such folder", str(path))
            return
        self._descriptor = _Descriptor(os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY))
        self.root = _DESCRIPTORS / str(self._descriptor.number)
        _held[self._descriptor.number] = self.path
        weakref.finalize(self, _held.pop, self._descriptor.number, None)


def named(path: Path) -> Path:
    """Return the name that people know of a path that may lead through a `HeldFolder`."""
    if path.is_relative_to(_DESCRIPTORS):
        number, *rest = path.relative_to(_DESCRIPTORS).parts
        if number.isdecimal() and int(number) in _held:
            return _held[int(number)].joinpath(*rest)
    return path


def sha256_of_all(hashes: Sequence[str]) -> str:
    """Return the hex SHA-256 that stands for files that belong together: of one its own, of several that of theirs.

    The graph of a model whose weights stand in a file of their own is the same for every checkpoint.
    """
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


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
            held = _Descriptor(os.dup(stream.fileno())) if _DESCRIPTORS.is_dir() else None
            return cls(path, digest, state, companion, (within, held))

    @property
    def content(self) -> str:
        """SHA-256 of it and its companion; see `sha256_of_all`."""
        return sha256_of_all([self.sha256, *([] if self.companion is None else [self.companion.content])])

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
