"""A bundle on disk, held while it is used: its files are those of the manifest, or it is refused."""

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from sa3_convert.bundle.manifest import (
    MANIFEST,
    SLOTS_OF,
    Artifact,
    ArtifactKind,
    FileEntry,
    Manifest,
)
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.json_file import faults
from sa3_convert.components import ADAPTED, Component
from sa3_convert.errors import BundleError, Sa3Error
from sa3_convert.system.checked_files import CheckedFile, FileState, HeldFolder, inside, named
from sa3_convert.system.files import write_text
from sa3_convert.system.untrusted import NotAFileError, parse_json, read_text

_SHOWN = 10


class Bundle:
    """A folder with a manifest.

    The folder is held open, so that manifest and files are of one bundle whatever comes to stand under its name. A file
    that was checked once is afterwards only asked whether it is still the same.
    """

    def __init__(self, path: Path, manifest: Manifest, folder: HeldFolder | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self._folder, self.root = HeldFolder(path) if folder is None else folder, path
        if manifest.base != ".":
            self.root = Path(os.path.realpath(path / manifest.base))
            self._folder = HeldFolder(self._folder.root / manifest.base, self.root)
        self._checked: dict[str, CheckedFile] = {}

    @classmethod
    def open(cls, path: Path, *, foreign: bool = True) -> "Bundle":
        """Read the manifest of a bundle, or of the one bundle in a tree; its files are looked at by `check`.

        Args:
            path: the folder, or one around it.
            foreign: open published models without a manifest too; see `bundle.foreign`.

        Raises:
            BundleError: no bundle stands there or several do, or its manifest is damaged.
            ModelFileError: a model without a manifest is damaged.

        """
        file = path / MANIFEST
        try:
            path = _folder_of(path)
            file = path / MANIFEST
            if foreign and not file.exists() and (described := _without_manifest(path)) is not None:
                return cls(path, described)
            folder = HeldFolder(path)
            inside(folder.root, MANIFEST)
            text = read_text(folder.root / MANIFEST)
            # Twice: what pydantic would take in silence (two keys of one name, numbers without end) is refused first.
            parse_json(text)
            return cls(path, Manifest.model_validate_json(text, strict=True), folder)
        except (FileNotFoundError, NotADirectoryError):
            if (advice := _of_checkpoint(path)) is not None:
                raise BundleError(advice) from None
            raise BundleError(f"{path} is no bundle: {file} does not exist. `sa3-convert convert` makes one.") from None
        except OSError as error:
            raise BundleError(f"{file} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            raise BundleError(f"{file} is damaged: {faults(error)}. Convert again.") from None
        except ValueError as error:
            raise BundleError(f"{file} is damaged: {str(error)[:500]}. Convert again.") from None

    @property
    def is_foreign(self) -> bool:
        """Whether it has no manifest, so that nobody has held its models to anything."""
        return self.manifest.is_foreign

    @property
    def layout(self) -> CheckpointLayout:
        """Dimensions of the checkpoint that the bundle was made from."""
        return self.manifest.layout

    @property
    def components(self) -> tuple[Component, ...]:
        """The components for which the bundle has a model, in pipeline order."""
        return tuple(c for c in Component if any(a.component is c and a.kind == "mnn" for a in self.manifest.artifacts))

    @property
    def model_kinds(self) -> set[ArtifactKind]:
        """The kinds of models that it has of every component, with slots of those that adapters change.

        What was kept outside and is gone does not count.
        """
        found: dict[ArtifactKind, set[Component | None]] = {}
        for artifact in self.manifest.artifacts:
            if artifact.kept_at is None or self.place(artifact, artifact).is_file():
                found.setdefault(artifact.kind, set()).add(artifact.component)
        whole = set(self.components)
        wanted = dict.fromkeys(SLOTS_OF.values(), whole.intersection(ADAPTED))
        return {kind for kind, components in found.items() if components >= wanted.get(kind, whole)}

    def artifact(self, component: Component | None, kind: ArtifactKind = "mnn") -> Artifact:
        """Return an artifact; BundleError if the bundle does not have it."""
        for artifact in self.manifest.artifacts:
            if artifact.component is component and artifact.kind == kind:
                return artifact
        what = kind if component is None else f"{kind} of component {component.value!r}"
        raise BundleError(f"Bundle {self.path} has no {what}.")

    def file(self, component: Component | None, kind: ArtifactKind = "mnn") -> Path:
        """Return the name of an artifact's file, for people; `checked` gives the file that the manifest describes."""
        artifact = self.artifact(component, kind)
        return self.place(artifact, artifact)

    def all_files(self) -> Iterator[Path]:
        """Yield the names of the manifest and of every file that it lists."""
        yield self.path / MANIFEST
        for artifact in self.manifest.artifacts:
            yield from (self.place(artifact, entry) for entry in artifact.files)

    def checked(self, component: Component | None, kind: ArtifactKind = "mnn", *, contents: bool = True) -> CheckedFile:
        """Return an artifact's file, its companion with it; see `check`."""
        return self._check(self.artifact(component, kind), contents)

    def checked_parts(
        self, component: Component, kind: ArtifactKind, *, contents: bool = True
    ) -> tuple[CheckedFile, ...]:
        """Return the graphs of an artifact in parts, each with the weights that all share; see `check`."""
        artifact = self.artifact(component, kind)
        companion = self._check(artifact, contents).companion
        return tuple(self._check_file(artifact, part, contents, companion) for part in artifact.parts)

    @contextlib.contextmanager
    def reading(self, kind: ArtifactKind) -> Iterator[Path]:
        """Yield the path of a checked file that belongs to no component; it must still be the same after the block.

        Of a tokenizer with a table, the table's.
        """
        artifact = self.artifact(None, kind)
        file = self._check_file(artifact, artifact.table or artifact, contents=True)
        try:
            yield file.path
        except Sa3Error as error:
            raise type(error)(str(error).replace(str(file.path), str(named(file.path)))) from None
        file.require_unchanged()

    def check(
        self,
        components: tuple[Component, ...] | None = None,
        kinds: tuple[str, ...] = ("mnn",),
        *,
        contents: bool = True,
    ) -> None:
        """Compare files with the manifest: presence, size, SHA-256. Files without a component are always checked.

        Args:
            components: whose files; None is all.
            kinds: of the files.
            contents: read the files for their SHA-256; without it only what the folder lists is compared.

        Raises:
            BundleError: one is missing, leads out of the bundle, is not what the manifest says, or not any more; the
                message names it.

        """
        for artifact in self.manifest.artifacts:
            if artifact.component is None or (
                artifact.kind in kinds and (components is None or artifact.component in components)
            ):
                self._check(artifact, contents)

    def _check(self, artifact: Artifact, contents: bool) -> CheckedFile:
        companion = None
        if artifact.companion is not None:
            companion = self._check_file(artifact, artifact.companion, contents)
        for part in artifact.parts:
            self._check_file(artifact, part, contents, companion)
        if artifact.table is not None:
            self._check_file(artifact, artifact.table, contents)
        return self._check_file(artifact, artifact, contents, companion)

    def _check_file(
        self, artifact: Artifact, entry: FileEntry, contents: bool, companion: CheckedFile | None = None
    ) -> CheckedFile:
        if (known := self._checked.get(entry.path)) is not None:
            known.require_unchanged()
            return known
        name, file = self.place(artifact, entry), self._reached(artifact, entry)
        try:
            state = FileState.at(file)
            if state.size == entry.bytes and contents:
                found = CheckedFile.read(file, within=self._folder, companion=companion)
            else:
                found = CheckedFile(file, entry.sha256, state, companion, (self._folder,))
        except NotAFileError:
            raise BundleError(f"{name} is no regular file. Convert again.") from None
        except OSError:
            why = (
                "although the manifest lists it. Convert again."
                if artifact.kept_at is None
                else "where the bundle's conversion kept it. Convert again (--with-reference puts it into the bundle)."
            )
            raise BundleError(f"{name} is missing {why}") from None
        if state.size != entry.bytes or found.sha256 != entry.sha256:
            raise BundleError(f"{name} is not the file that the manifest describes (size or SHA-256). Convert again.")
        if contents:
            self._checked[entry.path] = found
        return found

    def place(self, artifact: Artifact, entry: FileEntry) -> Path:
        """Return where one of an artifact's files is, in the bundle or outside."""
        if artifact.kept_at is None:
            return self.root / entry.path
        return self.root / artifact.kept_at / Path(entry.path).name

    def _reached(self, artifact: Artifact, entry: FileEntry) -> Path:
        """Return the path by which a file is reached, whatever the bundle's name leads to by now."""
        if artifact.kept_at is None:
            inside(self._folder.root, entry.path)
            return self._folder.root / entry.path
        return Path(os.path.realpath(self._folder.root / artifact.kept_at)) / Path(entry.path).name

    def is_whole(self, artifact: Artifact) -> bool:
        """Tell whether an artifact's files are there and are what the manifest says, to the last byte."""
        try:
            self._check(artifact, contents=True)
        except (BundleError, OSError, ValueError):
            return False
        return True

    def write(self) -> None:
        """Write the manifest; the last thing that happens to a bundle, so that it never describes what is not there."""
        inside(self.path, MANIFEST)
        write_text(self.path / MANIFEST, self.manifest.to_json())


def _folder_of(path: Path) -> Path:
    """Return the folder with the manifest: this one, or the only one that has one among those up to two below it."""
    if (path / MANIFEST).exists():
        return path
    found = sorted({file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/{MANIFEST}")})
    if len(found) > 1:
        raise BundleError(f"{path} holds {len(found)} bundles. Name one: {', '.join(map(str, found[:_SHOWN]))}.")
    return found[0] if found else path


def _of_checkpoint(path: Path) -> str | None:
    """Return what to do with a checkpoint where a bundle was expected, as commands that can be copied; else None."""
    from sa3_convert.checkpoint.config import is_checkpoint, read_layout
    from sa3_convert.checkpoint.variants import family_of

    if not is_checkpoint(path):
        return None
    recipe = "medium" if family_of(read_layout(path)) == "medium" else "int8"
    whole = path if path.name else path.absolute()
    checkpoint, out = (shlex.quote(str(name)) for name in (whole, whole.with_name(f"{whole.name}-{recipe}")))
    how = '--prompt "warm analog synth pad" -o out.wav'
    return (
        f"{path} is a checkpoint, not a bundle. Convert it, and run what comes out:\n"
        f"  sa3-convert convert {checkpoint} --recipe {recipe} --out {out}\n"
        f"  sa3-convert run {out} {how}\n"
        f"Or run it as it is, with PyTorch:\n"
        f"  sa3-convert run {checkpoint} --engine torch {how}"
    )


def _without_manifest(path: Path) -> Manifest | None:
    # A bundle of ours needs nothing that reads models.
    from sa3_convert.bundle.foreign import foreign_manifest

    return foreign_manifest(path)
