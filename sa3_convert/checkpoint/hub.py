"""Download a published checkpoint at one commit: only the files that are needed, resumable, placed when complete.

Besides uploads this is all that uses the network. Every file is held to the hash that the hub names for it, wherever
its bytes came from: the hub, the local Hugging Face cache, a download that was interrupted. Without a network that hash
is the name of the cache's blob.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sa3_convert.checkpoint.config import CONFIG, TEXT_ENCODER_FOLDER
from sa3_convert.checkpoint.hub_client import HubClient, Note, UnreachableError
from sa3_convert.checkpoint.hub_files import COMMIT, HUB_ID, CachedSnapshot, HubFile, Listing, download_folder, tidy
from sa3_convert.checkpoint.json_file import read_json
from sa3_convert.checkpoint.reader import SOURCE, TOKENIZER, Checkpoint
from sa3_convert.checkpoint.tensor_file import INDEX, WEIGHTS, shard_names
from sa3_convert.checkpoint.variants import PINNED
from sa3_convert.errors import CheckpointError, UsageError
from sa3_convert.system.files import check_new_folder, copy_file, require_space, sha256_file, take_name, write_text

Progress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes in all."""

_OURS = re.compile(
    rf"{TEXT_ENCODER_FOLDER}/|({TEXT_ENCODER_FOLDER}/)?[\w.-]+\.(json|safetensors)|[0-9a-f]+\.partial", re.ASCII
)
"""What a download may have left that can be gone on with."""


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
    note: Note = lambda _: None,
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
        note: told in words what happens meanwhile.
        endpoint: address of the hub; by default what HF_ENDPOINT says.

    Raises:
        UsageError: the id is malformed, the folder is not empty, the disk is too small, or another process downloads
            to the same folder.
        CheckpointError: the hub cannot be reached, refuses, or lacks a file; or what came is not what the hub names,
            or not a sound checkpoint.

    """
    if HUB_ID.fullmatch(hub_id) is None:
        raise UsageError(f"{hub_id!r} is no hub id; give org/name, for example stabilityai/stable-audio-3-small-music.")
    client = HubClient(hub_id, endpoint, note)
    with _explained(hub_id):
        target = Path(os.path.realpath(folder))
        check_new_folder(target)
        source = _source(client, hub_id, revision)
        with download_folder(target) as staging:
            check_new_folder(target)
            download = _Download(client, source, staging, note)
            download.bring_all(progress)
            download.record()
            Checkpoint.open(staging)
            take_name(staging, target)
    return Fetched(hub_id, source.commit, sum(file.size for file in download.files))


@contextlib.contextmanager
def _explained(hub_id: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        # ValueError: a path that holds NUL. RecursionError: a planted folder too deep to be removed.
        reason = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"Downloading {hub_id} failed: {reason}. Check the folder and the disk. "
            "What is there is kept; run the same command again to go on."
        ) from None


def _source(client: HubClient, hub_id: str, revision: str | None) -> Listing | CachedSnapshot:
    """Return what says which files there are: the hub; where it cannot be reached, a commit that is in the cache."""
    if revision is None:
        revision = PINNED.get(hub_id, "main")
    is_commit = COMMIT.fullmatch(revision) is not None
    try:
        listing = client.listing(revision)
    except UnreachableError:
        cached = CachedSnapshot(hub_id, revision) if is_commit else None
        if cached is None or CONFIG not in cached:
            raise
        return cached
    if is_commit and listing.commit != revision:
        raise CheckpointError(f"The hub answers with another commit of {hub_id} than {revision}. Is it in order?")
    return listing


def _monotone(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Return what tells progress of the whole download: it never falls, even where a file is begun anew."""
    most = -1

    def report(there: int) -> None:
        nonlocal most
        if progress is not None and there > most:
            most = there
            progress(there, total)

    return report


class _Download:
    """The files of one commit, brought into one folder."""

    def __init__(self, client: HubClient, source: Listing | CachedSnapshot, folder: Path, note: Note) -> None:
        self._client, self._source, self._folder, self._note = client, source, folder, note
        self._cache = CachedSnapshot(source.hub_id, source.commit)
        self.files: list[HubFile] = []

    def bring_all(self, progress: Progress | None) -> None:
        """Bring every file that the checkpoint needs; nothing else is left in the folder."""
        tidy(self._folder, lambda name: _OURS.fullmatch(name) is not None)
        self._bring([CONFIG], None)
        config = read_json(self._folder / CONFIG)
        names = self._weights("")
        if not (isinstance(config, dict) and config.get("model_type") == "autoencoder"):
            within = f"{TEXT_ENCODER_FOLDER}/"
            names += [f"{within}config.json", f"{within}{TOKENIZER}", *self._weights(within)]
        kept = {*names, *(file.name for file in self.files)}
        kept |= {f"{Path(name).parent}/" for name in kept if "/" in name}
        kept |= {self._partial(self._source.file(name)).name for name in names}
        tidy(self._folder, kept.__contains__)
        self._bring(names, progress)

    def record(self) -> None:
        """Write down where the files are from and what they are."""
        files = {
            file.name: {
                "sha256": file.digest if len(file.digest) == 64 else sha256_file(self._folder / file.name),
                "bytes": file.size,
            }
            for file in self.files
        }
        source = {"hub_id": self._source.hub_id, "revision": self._source.commit, "files": files}
        write_text(self._folder / SOURCE, json.dumps(source, indent=1) + "\n")

    def _weights(self, within: str) -> list[str]:
        """Return the names of the files that hold a folder's weights; their index is here already if they have one."""
        if f"{within}{WEIGHTS}" in self._source or f"{within}{INDEX}" not in self._source:
            return [f"{within}{WEIGHTS}"]
        self._bring([f"{within}{INDEX}"], None)
        return [f"{within}{name}" for name in shard_names(self._folder / within / INDEX)]

    def _bring(self, names: Sequence[str], progress: Progress | None) -> None:
        """Bring files that are not there yet, from the cache or the hub."""
        files = [self._source.file(name) for name in names]
        missing = [file for file in files if not self._is_there(file) and not self._take_cached(file)]
        if missing and isinstance(self._source, CachedSnapshot):
            damaged = self._cache.folder / missing[0].name
            raise CheckpointError(f"{damaged} is damaged. Remove it, and run the same command with a network.")
        total = sum(file.size for file in missing)
        there = sum(_size(self._partial(file)) for file in missing)
        require_space(self._folder, total - there, self._source.hub_id)
        done, report = 0, _monotone(progress, total)
        for file in missing:
            self._transfer(file, lambda there, done=done: report(done + there))  # type: ignore[misc]
            done += file.size
        self.files += files

    def _is_there(self, file: HubFile) -> bool:
        path = self._folder / file.name
        if file.is_at(path):
            self._partial(file).unlink(missing_ok=True)
            return True
        path.unlink(missing_ok=True)
        return False

    def _take_cached(self, file: HubFile) -> bool:
        if file.name not in self._cache:
            return False
        copy_file(self._cache.folder / file.name, self._folder / file.name)
        if self._is_there(file):
            return True
        if isinstance(self._source, Listing):
            self._note(f"{self._cache.folder / file.name} is damaged; it is downloaded.")
        return False

    def _partial(self, file: HubFile) -> Path:
        """Return where a file grows; under its hash, so that what another commit left is continued only if it is it."""
        return self._folder / f"{file.digest}.partial"

    def _transfer(self, file: HubFile, grown: Callable[[int], None]) -> None:
        partial = self._partial(file)
        continued = _size(partial) > 0
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with os.fdopen(descriptor, "r+b") as stream:
            if stream.seek(0, io.SEEK_END) > file.size:
                stream.truncate(stream.seek(0))
            self._client.download(file, self._source.commit, stream, grown)
            stream.flush()
            os.fsync(descriptor)
        if file.is_at(partial):
            target = self._folder / file.name
            target.parent.mkdir(exist_ok=True)
            take_name(partial, target)
            return
        partial.unlink()
        if not continued:
            raise CheckpointError(
                f"{file.name} of {self._source.hub_id} arrived damaged (its hash is not the hub's). "
                "Run the same command again."
            )
        self._note(f"What was there of {file.name} was damaged; it is downloaded anew.")
        self._transfer(file, grown)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
