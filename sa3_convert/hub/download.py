"""Bring files of one commit to a folder, from the local Hugging Face cache or the hub; a broken download resumes.

Whatever the bytes came from, the hub, the cache or an interrupted download, a file takes its name only when it is what
the hub names. Without a network that hash is the name of the cache's blob.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from sa3_convert.errors import HubError
from sa3_convert.hub.client import HubClient, Note, UnreachableError
from sa3_convert.hub.files import COMMIT, CachedSnapshot, HubFile, Listing, cached_commit
from sa3_convert.system.files import alone_in, copy_file, require_space, take_name, write_text

Progress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes in all."""

_PATIENCE: Final = 3600.0
"""Seconds that a download into the cache waits for another one of the same repository."""


def source_of(client: HubClient, hub_id: str, revision: str, *, offline: bool = False) -> Listing | CachedSnapshot:
    """Return what says which files there are: the hub; a commit that is in the cache where the hub is not to be asked.

    A commit that is in the cache also stands in for a hub that cannot be reached.
    """
    is_commit = COMMIT.fullmatch(revision) is not None
    commit = cached_commit(hub_id, revision)
    cached = None if commit is None else CachedSnapshot(hub_id, commit)
    if cached is not None and not cached.folder.is_dir():
        cached = None
    if offline:
        if cached is None:
            raise HubError(f"{hub_id} at revision {revision} is not in the local cache. Get it with a network first.")
        return cached
    try:
        listing = client.listing(revision)
    except UnreachableError:
        if cached is None or not is_commit:
            raise
        return cached
    if is_commit and listing.commit != revision:
        raise HubError(f"The hub answers with another commit of {hub_id} than {revision}. Is it in order?")
    return listing


@contextlib.contextmanager
def explained(hub_id: str) -> Iterator[None]:
    """Say what the system refuses while files are brought."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        # ValueError: a path that holds NUL. RecursionError: a planted folder too deep to be removed.
        reason = str(error).strip() or type(error).__name__
        raise HubError(
            f"Downloading {hub_id} failed: {reason}. Check the folder and the disk. "
            "What is there is kept; run the same command again to go on."
        ) from None


class Download:
    """Files of one commit, brought into a folder under their names."""

    def __init__(self, client: HubClient, source: Listing | CachedSnapshot, folder: Path, note: Note) -> None:
        self._client, self.source, self._folder, self._note = client, source, folder, note
        self.cache = CachedSnapshot(source.hub_id, source.commit)
        self.files: list[HubFile] = []

    def place(self, file: HubFile) -> Path:
        """Return where a file belongs."""
        return self._folder / file.name

    def partial(self, file: HubFile) -> Path:
        """Return where a file grows; under its hash, so that what another commit left is continued only if it is it."""
        return self._folder / f"{file.digest}.partial"

    def bring(self, names: Sequence[str], progress: Progress | None = None) -> None:
        """Bring files that are not there yet, from the cache or the hub."""
        files = [self.source.file(name) for name in names]
        missing = [file for file in files if not self._is_there(file) and not self._take_cached(file)]
        if missing and isinstance(self.source, CachedSnapshot):
            damaged = self.cache.folder / missing[0].name
            raise HubError(f"{damaged} is damaged. Remove it, and run the same command with a network.")
        total = sum(file.size for file in missing)
        there = sum(_size(self.partial(file)) for file in missing)
        if progress is not None and missing:
            self._note(f"{(total - there) / 2**20:.1f} MiB of {self.source.hub_id} are to be downloaded.")
        require_space(self._folder, total - there, self.source.hub_id)
        done, report = 0, _monotone(progress, total)
        for file in missing:
            self._transfer(file, lambda there, done=done: report(done + there))  # type: ignore[misc]
            done += file.size
        self.files += files

    def _is_there(self, file: HubFile) -> bool:
        if not file.is_at(self.place(file)):
            return False
        # A folder that is only read is of use, too.
        if self.partial(file).exists():
            self.partial(file).unlink()
        return True

    def _take_cached(self, file: HubFile) -> bool:
        if file.name not in self.cache:
            return False
        self.place(file).unlink(missing_ok=True)
        copy_file(self.cache.folder / file.name, self.place(file))
        if self._is_there(file):
            return True
        if isinstance(self.source, Listing):
            self._note(f"{self.cache.folder / file.name} is damaged; it is downloaded.")
        return False

    def _transfer(self, file: HubFile, grown: Callable[[int], None]) -> None:
        partial = self.partial(file)
        continued = _size(partial) > 0
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with os.fdopen(descriptor, "r+b") as stream:
            if stream.seek(0, io.SEEK_END) > file.size:
                stream.truncate(stream.seek(0))
            self._client.download(file, self.source.commit, stream, grown)
            stream.flush()
            os.fsync(descriptor)
        if file.is_at(partial):
            target = self.place(file)
            target.parent.mkdir(exist_ok=True)
            take_name(partial, target)
            return
        partial.unlink()
        if not continued:
            raise HubError(
                f"{file.name} of {self.source.hub_id} arrived damaged (its hash is not the hub's). "
                "Run the same command again."
            )
        self._note(f"What was there of {file.name} was damaged; it is downloaded anew.")
        self._transfer(file, grown)


class CacheDownload(Download):
    """Files of one commit, brought into the hub's own cache, as its library lays it out."""

    def __init__(self, client: HubClient, source: Listing | CachedSnapshot, note: Note) -> None:
        cache = CachedSnapshot(source.hub_id, source.commit)
        super().__init__(client, source, cache.repository / "blobs", note)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other downloads of the repository waiting for the block."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(alone_in(self._folder))
            except BlockingIOError:
                self._note(f"Another download of {self.source.hub_id} is under way; waiting for it …")
                stack.enter_context(alone_in(self._folder, _PATIENCE))
            yield

    def place(self, file: HubFile) -> Path:
        """Return the file's blob."""
        return self._folder / file.digest

    def bring(self, names: Sequence[str], progress: Progress | None = None) -> None:
        """Bring files that are not there yet, and give them their names in the commit's folder."""
        super().bring(names, progress)
        for file in (self.source.file(name) for name in names):
            name, blob = self.cache.folder / file.name, self.place(file)
            name.parent.mkdir(parents=True, exist_ok=True)
            leads = Path(os.path.relpath(blob, name.parent))
            stands = not blob.exists() or (name.is_symlink() and name.readlink() == leads)
            if isinstance(self.source, Listing) and not stands:
                name.unlink(missing_ok=True)
                try:
                    name.symlink_to(leads)
                except OSError:
                    # On Windows links are for administrators; the hub's library moves the file there, too.
                    blob.replace(name)

    def _take_cached(self, file: HubFile) -> bool:
        return file.is_at(self.cache.folder / file.name)

    def remember(self, revision: str) -> None:
        """Write down which commit a branch or tag is."""
        if isinstance(self.source, Listing) and COMMIT.fullmatch(revision) is None:
            reference = self.cache.repository / "refs" / revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            write_text(reference, self.source.commit)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _monotone(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Return what tells progress of the whole download: it never falls, even where a file is begun anew."""
    most = -1

    def report(there: int) -> None:
        nonlocal most
        if progress is not None and there > most:
            most = there
            progress(there, total)

    return report
