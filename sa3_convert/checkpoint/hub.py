"""Download a published checkpoint at one commit: only the files that are needed, resumable, placed when complete.

Besides uploads this is all that uses the network. The hub library speaks to the hub; what it does not do is to go on
with a broken file in a later run, which at 9 GB matters, so files are kept as `.partial` beside the target and
continued.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_convert.checkpoint.layout import TEXT_ENCODER_FOLDER, read_json
from sa3_convert.checkpoint.reader import CONFIG, TOKENIZER, WEIGHTS, Checkpoint
from sa3_convert.checkpoint.variants import VARIANTS
from sa3_convert.errors import CheckpointError, UsageError
from sa3_convert.files import copy_file, sha256_file, write_text

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

Progress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes in all."""

SOURCE = "source.json"
_TEXT_ENCODER_FILES = tuple(f"{TEXT_ENCODER_FOLDER}/{name}" for name in ("config.json", TOKENIZER, WEIGHTS))
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was downloaded."""

    hub_id: str
    revision: str
    """The commit."""
    nbytes: int


def fetch(
    hub_id: str,
    folder: Path,
    revision: str | None = None,
    progress: Progress | None = None,
    *,
    endpoint: str | None = None,
) -> Fetched:
    """Download a checkpoint into `folder`, which takes its name only when every file is there and checked.

    Files that the local Hugging Face cache has at the same commit are taken from there.

    Args:
        hub_id: `org/name`.
        folder: must not exist or be empty. After an interruption the same call goes on where it stopped.
        revision: commit, branch or tag; by default the pinned commit of a published variant, else `main`. The commit
            that it stands for is recorded in `source.json`.
        progress: told about bytes.
        endpoint: address of the hub; by default what HF_ENDPOINT says.

    Raises:
        UsageError: the id is malformed, the folder is not empty, or the disk is too small.
        CheckpointError: the hub cannot be reached, refuses, or lacks a file; or what came is not a sound checkpoint.

    """
    if _HUB_ID.fullmatch(hub_id) is None:
        raise UsageError(f"{hub_id!r} is no hub id; give org/name, for example stabilityai/stable-audio-3-small-music.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty. Give another folder, or remove it first.")
    with _explained(hub_id):
        commit = _commit(hub_id, revision, endpoint)
        download = _Download(hub_id, commit, endpoint, _staging(folder, hub_id, commit))
        download.bring([CONFIG], None)
        config = read_json(download.folder / CONFIG)
        alone = isinstance(config, dict) and config.get("model_type") == "autoencoder"
        download.bring([WEIGHTS, *(() if alone else _TEXT_ENCODER_FILES)], progress)
    Checkpoint.open(download.folder)
    nbytes = download.finish()
    folder.parent.mkdir(parents=True, exist_ok=True)
    download.folder.rename(folder)
    return Fetched(hub_id, commit, nbytes)


@contextlib.contextmanager
def _explained(hub_id: str) -> Iterator[None]:
    """Turn what the hub library raises into what the user can do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.errors import HTTPError as TransportError

    try:
        yield
    except GatedRepoError:
        raise CheckpointError(
            f"{hub_id} is gated. Accept its licence at https://huggingface.co/{hub_id}, then log in with "
            "`hf auth login` (or set HF_TOKEN) and run the same command again."
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"The hub has no {hub_id}, or it is private and you are not logged in. Check the id, or `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{hub_id} has no such revision. Leave --revision out, or give a commit of it.") from None
    except EntryNotFoundError as error:
        raise CheckpointError(f"{hub_id} is no Stable Audio 3 checkpoint, a file is missing: {_first(error)}") from None
    except OfflineModeIsEnabled:
        raise CheckpointError(
            f"{hub_id} is not wholly in the local cache and HF_HUB_OFFLINE is set. Unset it to download."
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"The hub refused {hub_id}: {_first(error)} What is there is kept; run the same command again to go on."
        ) from None
    except (TransportError, OSError) as error:
        raise CheckpointError(
            f"Downloading {hub_id} failed: {_first(error)} Check the network and the disk. "
            "What is there is kept; run the same command again to go on."
        ) from None


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."


def _commit(hub_id: str, revision: str | None, endpoint: str | None) -> str:
    from huggingface_hub import HfApi

    if revision is None:
        revision = next((v.revision for v in VARIANTS.values() if v.hub_id == hub_id), "main")
    if _COMMIT.fullmatch(revision):
        return revision
    commit = HfApi(endpoint=endpoint).model_info(hub_id, revision=revision).sha
    if commit is None:
        raise CheckpointError(f"The hub does not say which commit {revision!r} of {hub_id} is. Give the commit itself.")
    return commit


def _staging(folder: Path, hub_id: str, commit: str) -> Path:
    """Return the folder that an interrupted download of the same commit has left, or a new one."""
    staging = folder.parent / f".{folder.name}.download"
    source = {"hub_id": hub_id, "revision": commit}
    with contextlib.suppress(OSError, ValueError):
        if json.loads((staging / SOURCE).read_text(encoding="utf-8")) == source:
            return staging
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write_text(staging / SOURCE, json.dumps(source) + "\n")
    return staging


def _share(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    """Return what turns a file's bytes into those of the whole download."""

    def report(there: int) -> None:
        if progress is not None:
            progress(before + there, total)

    return report


class _Growing(io.FileIO):
    """A file that is continued, and says so."""

    def __init__(self, path: Path, grown: Callable[[int], None]) -> None:
        super().__init__(path, "r+" if path.exists() else "w+")
        self._grown = grown
        self.seek(0, io.SEEK_END)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        super().write(data)
        self._grown(self.tell())
        return len(data)


class _Download:
    """The files of one commit, brought into one folder."""

    def __init__(self, hub_id: str, commit: str, endpoint: str | None, folder: Path) -> None:
        self._hub_id, self._commit, self._endpoint = hub_id, commit, endpoint
        self.folder = folder
        self._names: list[str] = []

    def bring(self, names: Sequence[str], progress: Progress | None) -> None:
        """Bring files that are not there yet, from the cache or the hub."""
        self._names += names
        missing = [name for name in names if not self._take_cached(name)]
        metadata = {name: self._metadata(name) for name in missing}
        sizes = {name: data.size or 0 for name, data in metadata.items()}
        self._check_space(sum(sizes.values()))
        done, total = 0, sum(sizes.values())
        for name, data in metadata.items():
            self._transfer(name, data, _share(progress, done, total))
            done += sizes[name]

    def finish(self) -> int:
        """Record hashes and return the bytes in all."""
        files = {
            name: {"sha256": sha256_file(self.folder / name), "bytes": (self.folder / name).stat().st_size}
            for name in self._names
        }
        source = {"hub_id": self._hub_id, "revision": self._commit, "files": files}
        write_text(self.folder / SOURCE, json.dumps(source, indent=1) + "\n")
        return sum((self.folder / name).stat().st_size for name in self._names)

    def _take_cached(self, name: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        if (self.folder / name).is_file():
            return True
        cached = try_to_load_from_cache(self._hub_id, name, revision=self._commit)
        if not isinstance(cached, str):
            return False
        copy_file(Path(cached).resolve(), self.folder / name)
        return True

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self._hub_id, name, revision=self._commit, endpoint=self._endpoint)

    def _metadata(self, name: str) -> "HfFileMetadata":
        from huggingface_hub import get_hf_file_metadata

        return get_hf_file_metadata(self._url(name), endpoint=self._endpoint)

    def _check_space(self, needed: int) -> None:
        there = sum(file.stat().st_size for file in self.folder.rglob("*.partial"))
        free = shutil.disk_usage(self.folder).free
        if free < needed - there:
            raise UsageError(
                f"{self._hub_id} needs {(needed - there) / 2**30:.1f} GiB more, {self.folder.parent} has "
                f"{free / 2**30:.1f} GiB left. Make room or give a folder on another disk."
            )

    def _transfer(self, name: str, metadata: "HfFileMetadata", grown: Callable[[int], None]) -> None:
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars

        disable_progress_bars()
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        with _Growing(partial, grown) as stream:
            if metadata.size is not None and stream.tell() > metadata.size:
                stream.truncate(0)
                stream.seek(0)
            http_get(
                self._url(name),
                stream,
                resume_size=stream.tell(),
                headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                expected_size=metadata.size,
            )
            os.fsync(stream.fileno())
        if not _is_whole(partial, metadata.etag):
            partial.unlink()
            raise CheckpointError(
                f"{name} of {self._hub_id} arrived damaged (its hash is not the hub's). Run the same command again."
            )
        partial.rename(target)


def _is_whole(path: Path, etag: str | None) -> bool:
    """Check a file against its ETag: SHA-256 for large files, git's blob hash for small ones."""
    if etag is None:
        return True
    if _SHA256.fullmatch(etag):
        return sha256_file(path) == etag
    if _COMMIT.fullmatch(etag):
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == etag
    return True
