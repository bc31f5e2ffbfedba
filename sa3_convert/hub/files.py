"""Which bytes a file of the hub must have, and the folder in which a download grows until it is whole."""

import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from sa3_convert.errors import HubError, UsageError
from sa3_convert.system.checked_files import cached_repository
from sa3_convert.system.files import alone_in
from sa3_convert.system.untrusted import open_regular, parse_json, read_text

_WORD = r"[A-Za-z0-9][\w.+-]*"
_ID = re.compile(
    rf"(?P<repository>{_WORD}/{_WORD})(/(?P<folder>{_WORD}(/{_WORD})*))?(@(?P<revision>{_WORD}(/{_WORD})*))?", re.ASCII
)
COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REFERENCE = 1 << 10
"""Bytes that a file of the cache may have which says what a branch is."""


@dataclass(frozen=True, slots=True)
class HubId:
    """`ORG/NAME[/FOLDER][@REVISION]`."""

    repository: str
    folder: str = ""
    """Within the repository."""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubId | None":
        """Read one; None if it is none."""
        match = _ID.fullmatch(text)
        return match and cls(match["repository"], match["folder"] or "", match["revision"])

    @classmethod
    def meant_by(cls, path: Path) -> "HubId | None":
        """Return the id that a name stands for: of the form of one, where no such path is, nor one to hold it."""
        meant = None if path.is_absolute() or os.path.lexists(path) else cls.parse(path.as_posix())
        if meant is None or (meant.revision is None and os.path.lexists(path.parts[0])):
            return None
        return meant

    @classmethod
    def of_snapshot(cls, path: Path) -> "HubId | None":
        """Return what a folder in the hub's cache holds, with its commit; None for any other folder."""
        repository = cached_repository(path)
        if repository is None:
            return None
        commit, *folder = Path(os.path.realpath(path)).relative_to(repository / "snapshots").parts
        return cls(repository.name.removeprefix("models--").replace("--", "/", 1), "/".join(folder), commit)

    def __str__(self) -> str:
        within = f"/{self.folder}" if self.folder else ""
        return f"{self.repository}{within}{f'@{self.revision}' if self.revision else ''}"


def is_repository(text: str) -> bool:
    """Tell whether a text is `ORG/NAME`, and nothing more."""
    return HubId.parse(text) == HubId(text)


@dataclass(frozen=True, slots=True)
class HubFile:
    """What a file must be."""

    name: str
    size: int
    digest: str
    """Hex: SHA-256, or git's blob hash."""

    def is_at(self, path: Path) -> bool:
        """Tell whether exactly this file stands at a path, by its content."""
        try:
            with open_regular(path) as stream:
                if stream.seek(0, 2) != self.size:
                    return False
                stream.seek(0)
                if len(self.digest) == 64:
                    return hashlib.file_digest(stream, "sha256").hexdigest() == self.digest
                blob = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
                while piece := stream.read(1 << 20):
                    blob.update(piece)
                return blob.hexdigest() == self.digest
        except OSError:
            return False


class _Lfs(BaseModel):
    model_config = ConfigDict(strict=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    """A file in the hub's answer; `blobId` of one with `lfs` is the pointer's, not the content's."""

    model_config = ConfigDict(strict=True)

    rfilename: str
    size: Annotated[int, Field(ge=0)]
    blob_id: Annotated[str, Field(alias="blobId", pattern=r"^[0-9a-f]{40}$")]
    lfs: _Lfs | None = None


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True)

    sha: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    siblings: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one commit."""

    hub_id: str
    commit: str
    _entries: Mapping[str, Mapping[str, Any]]
    """As the hub sent them: only what is needed has to be sound."""

    @classmethod
    def parse(cls, hub_id: str, answer: bytes) -> "Listing":
        """Read the hub's answer about one revision.

        Raises:
            HubError: it is not such an answer.

        """
        try:
            data = _Answer.model_validate(parse_json(answer.decode("utf-8")))
        except ValueError:
            raise HubError(
                f"The answer about {hub_id} is not the hub's list of files, or names no commit. "
                "Is HF_ENDPOINT the address of a hub, and the network free of login pages?"
            ) from None
        names = [str(entry.get("rfilename")) for entry in data.siblings]
        if len(set(names)) != len(names):
            raise HubError(f"The hub's list of {hub_id} names a file twice. Give another revision.")
        return cls(hub_id, data.sha, dict(zip(names, data.siblings, strict=True)))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> Iterator[str]:
        """Yield the names of all files, whatever they look like."""
        yield from self._entries

    def file(self, name: str) -> HubFile:
        """Return what a file must be."""
        if name not in self._entries:
            raise HubError(f"Of {self.hub_id} a file is missing: {name}. Give another id or revision.")
        try:
            entry = _Entry.model_validate(self._entries[name])
        except ValueError:
            raise HubError(
                f"The hub does not say which size and hash {name} of {self.hub_id} has, so it cannot be checked. "
                "Is HF_ENDPOINT the address of a hub?"
            ) from None
        return HubFile(name, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)


class CachedSnapshot:
    """What the local Hugging Face cache has of one commit. Nothing in it is believed: a blob is held to a hash."""

    def __init__(self, hub_id: str, commit: str) -> None:
        self.hub_id, self.commit = hub_id, commit
        self.repository = _repository(hub_id)
        self.folder = self.repository / "snapshots" / commit

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def names(self) -> Iterator[str]:
        """Yield the names of all files that are there."""
        yield from (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def file(self, name: str) -> HubFile:
        """Return what a file must be by its blob's name, which is the hash that the hub gave when it was cached."""
        if name not in self:
            raise HubError(f"{name} of {self.hub_id} is not in the local cache, and the hub cannot be reached.")
        blob = Path(os.path.realpath(self.folder / name))
        if _HASH.fullmatch(blob.name) is None:
            raise HubError(
                f"{self.folder / name} cannot be checked without the hub: its blob is not named by a hash. "
                "Run the same command with a network."
            )
        return HubFile(name, blob.stat().st_size, blob.name)

    def damaged(self) -> Iterator[Path]:
        """Yield the blobs of JSON files and weights whose content is not what their names say."""
        for path in sorted(self.folder.rglob("*")):
            blob = Path(os.path.realpath(path))
            if path.suffix not in (".json", ".safetensors") or not path.is_file() or not _HASH.fullmatch(blob.name):
                continue
            if not HubFile(path.name, blob.stat().st_size, blob.name).is_at(blob):
                yield blob


def cached_commit(hub_id: str, revision: str) -> str | None:
    """Return the commit that a branch or tag was when it was last cached, or None; a commit is itself."""
    if COMMIT.fullmatch(revision):
        return revision
    try:
        commit = read_text(_repository(hub_id) / "refs" / revision, _REFERENCE).strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def _repository(hub_id: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"


@contextlib.contextmanager
def download_folder(target: Path) -> Iterator[Path]:
    """Yield the folder for a download to `target`, what an interrupted one left included; held locked meanwhile.

    It is removed when nothing is in it after the block, and stays when it was renamed.
    """
    folder = target.with_name(f".{target.name}.download")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone_in(folder))
        except BlockingIOError:
            raise UsageError(f"Another download to {target} is under way. Wait for it, or end it.") from None
        except FileNotFoundError:  # renamed just before
            raise UsageError(f"Another download to {target} has just finished.") from None
        own = folder.lstat()
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(folder.lstat(), own):
                    folder.rmdir()


def tidy(folder: Path, keep: Callable[[str], bool]) -> None:
    """Remove all but what `keep` tells of each name below `folder`, and links and files with a second name too."""
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
