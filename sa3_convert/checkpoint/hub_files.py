"""Which bytes a file of the hub must have: by the hub's own list, or by the names that the local cache gives its blobs.

Large files are named by their SHA-256, small ones by git's blob hash (SHA-1). The list is fetched once per commit and
names a hash and a size for every file, so where the bytes come from does not matter: the hub, the cache, an earlier
download. A file without a hash is refused.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from sa3_convert.checkpoint.layout import TEXT_ENCODER_FOLDER
from sa3_convert.errors import CheckpointError
from sa3_convert.untrusted import open_regular, parse_json, read_text

COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REFERENCE = 1 << 10
"""Bytes that a file of the cache may have which says what a branch is."""


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
            CheckpointError: it is not such an answer.

        """
        try:
            data = _Answer.model_validate(parse_json(answer.decode("utf-8")))
        except ValueError:
            raise CheckpointError(
                f"The answer about {hub_id} is not the hub's list of files, or names no commit. "
                "Is HF_ENDPOINT the address of a hub, and the network free of login pages?"
            ) from None
        names = [str(entry.get("rfilename")) for entry in data.siblings]
        if len(set(names)) != len(names):
            raise CheckpointError(f"The hub's list of {hub_id} names a file twice. Give another --revision.")
        return cls(hub_id, data.sha, dict(zip(names, data.siblings, strict=True)))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def file(self, name: str) -> HubFile:
        """Return what a file must be.

        Raises:
            CheckpointError: there is no such file, or the hub does not say what it must be.

        """
        if name not in self._entries:
            raise CheckpointError(f"{self.hub_id} is no Stable Audio 3 checkpoint, a file is missing: {name}.")
        try:
            entry = _Entry.model_validate(self._entries[name])
        except ValueError:
            raise CheckpointError(
                f"The hub does not say which size and hash {name} of {self.hub_id} has, so it cannot be checked. "
                "Is HF_ENDPOINT the address of a hub?"
            ) from None
        return HubFile(name, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)


class CachedSnapshot:
    """What the local Hugging Face cache has of one commit. Nothing in it is believed: a blob is held to a hash."""

    def __init__(self, hub_id: str, commit: str) -> None:
        self.hub_id, self.commit = hub_id, commit
        self.folder = _repository(hub_id) / "snapshots" / commit

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def file(self, name: str) -> HubFile:
        """Return what a file must be by its blob's name, which is the hash that the hub gave when it was cached.

        Raises:
            CheckpointError: it is not there, or its blob is not named by a hash.

        """
        if name not in self:
            raise CheckpointError(f"{name} of {self.hub_id} is not in the local cache, and the hub cannot be reached.")
        blob = Path(os.path.realpath(self.folder / name))
        if _HASH.fullmatch(blob.name) is None:
            raise CheckpointError(
                f"{self.folder / name} cannot be checked without the hub: its blob is not named by a hash. "
                "Run the same command with a network."
            )
        return HubFile(name, blob.stat().st_size, blob.name)

    def damaged(self) -> Iterator[Path]:
        """Yield the blobs of JSON files and weights whose content is not what their names say."""
        for path in sorted(self.folder.glob("*")) + sorted(self.folder.glob(f"{TEXT_ENCODER_FOLDER}/*")):
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
