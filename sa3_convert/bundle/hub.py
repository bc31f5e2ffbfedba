"""Bundles of the hub: chosen by the list of files, brought into the hub's cache, opened there like any other.

Only what is needed is brought: the manifest first, then the files that it names; of published models without one, the
model of each component that `foreign` would choose, and what lies with them.
"""

import posixpath
import re
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from sa3_convert.bundle.foreign import SHARED, belonging, beside, unfitness
from sa3_convert.bundle.manifest import MANIFEST, Manifest
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.config import CONFIG
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, HubError
from sa3_convert.hub.client import HubClient, Note, UnreachableError
from sa3_convert.hub.download import CacheDownload, Progress, explained, source_of
from sa3_convert.hub.files import CachedSnapshot, HubId, Listing
from sa3_convert.system.untrusted import SMALL

_PLAIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*){0,7}")
"""Names of files that are looked at; a bundle has no others."""
_MOST_BUNDLES: Final = 20
_MODEL: Final = re.compile(f"({'|'.join(map(re.escape, sorted(Component, key=len, reverse=True)))})(?![a-z])")


def bring_bundle(
    path: Path,
    kinds: Collection[str] | None = None,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    note: Note = lambda _: None,
    endpoint: str | None = None,
) -> Path:
    """Return the folder of a bundle: the path itself, or in the hub's cache what the id that it stands for names.

    Args:
        path: a folder, which is returned as it is without asking anybody, or `ORG/NAME[/FOLDER][@REVISION]`.
        kinds: of the files that are needed, all when not given; files without a component come with any.
        offline: take what the cache has, and ask nobody.
        progress: told about bytes.
        note: told in words what happens: the commit and the sizes before anything is downloaded.
        endpoint: address of the hub; by default what HF_ENDPOINT says.

    Raises:
        HubError: the hub cannot be reached, refuses, or lacks a file; or what came is not what it names.
        BundleError: there is no bundle in it, or there are several; or its manifest contradicts the hub.
        UsageError: the disk is too small.

    """
    meant = HubId.meant_by(path)
    if meant is None:
        return path
    from huggingface_hub import constants

    revision, offline = meant.revision or "main", offline or constants.HF_HUB_OFFLINE
    with explained(str(meant)):
        client = HubClient(meant.repository, endpoint, note)
        source = _source(meant, revision, client, offline)
        download = CacheDownload(client, source, note)
        with download.alone():
            tree = _Tree(download, HubId(meant.repository, meant.folder, source.commit))
            folder = tree.one_bundle()
            names = tree.needed(folder, kinds)
            size = sum(source.file(name).size for name in names)
            note(f"{tree.named(folder)}: {len(names)} files, {_mib(size)}")
            download.bring(names, progress)
            download.remember(revision)
    return download.cache.folder / folder


def _source(meant: HubId, revision: str, client: HubClient, offline: bool) -> Listing | CachedSnapshot:
    try:
        return source_of(client, meant.repository, revision, offline=offline)
    except UnreachableError as error:
        raise UnreachableError(f"{error} What was downloaded before is used with --offline.") from None
    except HubError as error:
        raise HubError(f"There is no folder {meant} here. {error}") from None


class _Tree:
    """The files of one commit by their names."""

    def __init__(self, download: CacheDownload, meant: HubId) -> None:
        self._download, self._meant = download, meant
        within = f"{meant.folder}/" if meant.folder else ""
        self._names = sorted(name for name in download.source.names() if _PLAIN.fullmatch(name))
        self._below = [name for name in self._names if name.startswith(within)]

    def named(self, folder: str) -> HubId:
        """Return the id of a folder."""
        return HubId(self._meant.repository, folder, self._meant.revision)

    def one_bundle(self) -> str:
        """Return the folder that is meant, or the only bundle in it."""
        meant = self._meant
        found = self._bundles()
        if meant.folder in found:
            return meant.folder
        if len(found) == 1:
            return found[0]
        if not found and CONFIG in self._names:
            name = meant.repository.partition("/")[2]
            raise BundleError(
                f"{meant} is a checkpoint, not a bundle. Download it, and convert it:\n"
                f"  sa3-convert checkpoint fetch {meant.repository} {name} --revision {meant.revision}\n"
                f"  sa3-convert convert {name} --out {name}-mnn"
            )
        if not found:
            raise BundleError(f"{meant} holds no bundle and no models: there is no {MANIFEST} and no DiT for MNN.")
        shown = [f"{self.named(folder)} ({_mib(self._size(folder))})" for folder in found[:_MOST_BUNDLES]]
        more = "" if len(found) <= _MOST_BUNDLES else f", and {len(found) - _MOST_BUNDLES} more"
        raise BundleError(f"{meant} holds {len(found)} bundles. Name one: {', '.join(shown)}{more}.")

    def _bundles(self) -> list[str]:
        """Return the folders with a manifest, as a folder on disk is searched; without any, those with a DiT."""
        depth = self._meant.folder.count("/") + bool(self._meant.folder)
        paths = [PurePosixPath(name) for name in self._below]
        near = [path for path in paths if len(path.parts) <= depth + 3]
        folders = {path.parent for path in near if path.name == MANIFEST}
        if not folders:
            folders = {path.parent for path in paths if path.suffix == ".mnn" and _component(path) is Component.DIT}
        return sorted("" if str(folder) == "." else str(folder) for folder in folders)

    def _size(self, folder: str) -> int:
        return sum(self._download.source.file(name).size for name in self.needed(folder, None))

    def needed(self, folder: str, kinds: Collection[str] | None) -> list[str]:
        """Return the names of what a bundle needs; its manifest is there already."""
        name = posixpath.join(folder, MANIFEST)
        if name not in self._names:
            return self._models(folder)
        if self._download.source.file(name).size > SMALL:
            raise BundleError(f"{name} of {self._meant} is too large to be a manifest.")
        self._download.bring([name])
        manifest = Bundle.open(self._download.cache.folder / folder, foreign=False).manifest
        return [name, *self._listed(folder, manifest, kinds)]

    def _listed(self, folder: str, manifest: Manifest, kinds: Collection[str] | None) -> Sequence[str]:
        """Return the files that a manifest names, which must be what the hub has."""
        root = posixpath.normpath(posixpath.join(folder or ".", manifest.base))
        if root.startswith(".."):
            raise BundleError(f"The manifest of {self.named(folder)} leads out of it. Nothing is read there.")
        found = []
        for artifact in manifest.artifacts:
            is_wanted = kinds is None or artifact.kind in kinds or (artifact.component is None and kinds)
            if artifact.kept_at is None and is_wanted:
                for entry in artifact.files:
                    file = self._download.source.file(posixpath.normpath(posixpath.join(root, entry.path)))
                    if file.size != entry.bytes or (len(file.digest) == 64 and file.digest != entry.sha256):
                        raise BundleError(
                            f"{file.name} of {self.named(folder)} is not the file that its manifest describes (size "
                            "or SHA-256). Tell whoever published it."
                        )
                    found.append(file.name)
        return found

    def _models(self, folder: str) -> list[str]:
        """Return the models that would be chosen of those without a manifest, and what lies with them."""
        names = {PurePosixPath(name): self._download.source.file(name).size for name in self._near(folder)}
        home = PurePosixPath(folder)
        own = [path for path in names if path.suffix == ".mnn" and path.is_relative_to(home)]
        by_component: dict[Component, list[PurePosixPath]] = {}
        for path in sorted(belonging(home, own, [path for path in names if path not in own])[1], key=names.__getitem__):
            if (component := _component(path)) is not None:
                by_component.setdefault(component, []).append(path)
        dit = by_component.get(Component.DIT, [home / Component.DIT])[0]
        models = [min(paths, key=lambda path: unfitness(path, dit)) for paths in by_component.values()]
        weights = [path for model in models if (path := model.with_name(f"{model.name}.weight")) in names]
        return [str(path) for path in (*models, *weights, *(place for _, place in beside(models, names.__contains__)))]

    def _near(self, folder: str) -> list[str]:
        """Return the names below a folder, and of a precision's folder in a published tree what that folder shares."""
        home = PurePosixPath(folder)
        tree = home.parent.parent

        def is_shared(path: PurePosixPath) -> bool:
            is_encoder = path.match(f"*/{home.name}/encoder*.mnn") and path.parent.parent.parent == tree
            return len(home.parts) > 1 and (path.parent == tree / SHARED or is_encoder)

        paths = {name: PurePosixPath(name) for name in self._names}
        return [name for name, path in paths.items() if path.is_relative_to(home) or is_shared(path)]


def _component(path: PurePosixPath) -> Component | None:
    match = _MODEL.match(path.name)
    return None if match is None else Component(match[1])


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
