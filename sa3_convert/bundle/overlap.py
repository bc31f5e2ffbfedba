"""What is written must be nothing that is read, nor two things one file: found by what paths lead to, not as text."""

import os
import unicodedata
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path

from sa3_convert.errors import BundleError, UsageError
from sa3_convert.system.streams import descriptor_of, identity

Named = tuple[str, Path]
"""A path, and what it is to the user: an option or a line of a file."""


def require_apart(writes: Iterable[Named], reads: Iterable[Named]) -> None:
    """Check, before anything is done, that no file is written over one that is read, or over another that is written.

    Links of either kind are followed; of a folder that is read, every file that it is read for counts.
    """
    read = {key: named for named in reads for file in _files(named[1]) for key in _keys(file)}
    written: dict[Hashable, Named] = {}
    for name, path in writes:
        for key in _keys(path):
            if key in read:
                reader, source = read[key]
                raise UsageError(f"{name} {path} would replace what is read: {reader} {source}. Name another file.")
        for key in _names(path):
            if key in written:
                other, twin = written[key]
                raise UsageError(f"{other} {twin} and {name} {path} are one file. Name two.")
        written |= dict.fromkeys(_names(path), (name, path))


def require_outside(writes: Iterable[Named], reads: Iterable[Named]) -> None:
    """Check that no folder that is made lies within one that is read, or around it."""
    folders = [(reader, source, Path(os.path.realpath(source))) for reader, source in reads if source.is_dir()]
    for name, path in writes:
        made = Path(os.path.realpath(path))
        for reader, source, folder in folders:
            if made.is_relative_to(folder) or folder.is_relative_to(made):
                where = "in" if made.is_relative_to(folder) else "around"
                raise UsageError(f"{name} {path} is {where} what is read: {reader} {source}. Name another folder.")


def folded(name: str) -> str:
    """Return what is equal for spellings of a name that some file systems take for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _files(path: Path) -> Iterator[Path]:
    """Yield what is read where a path is given for reading."""
    yield path
    if not path.is_dir():
        # Of an ONNX, and of a model too large for one file.
        yield path.with_name(f"{path.name}.data")
        yield path.with_name(f"{path.name}.weight")
        return
    # Pydantic is of no use to commands that read no folder.
    from sa3_convert.bundle.reader import Bundle

    try:
        yield from Bundle.open(path, foreign=False).all_files()
    except BundleError:
        # Where a checkpoint has files.
        yield from (*path.glob("*"), *path.glob("*/*"))


def _keys(path: Path) -> Iterator[Hashable]:
    """Yield what is equal for two paths that lead to one file; nothing for where all is thrown away."""
    descriptor = descriptor_of(path)
    if descriptor is not None:
        yield descriptor
    elif (real := os.path.realpath(path)) != os.devnull:
        yield real
    if (found := identity(path)) is not None:
        yield found


def _names(path: Path) -> Iterator[Hashable]:
    """Yield what is equal for two paths that become one file, on file systems too that take `A` for `a`."""
    for key in _keys(path):
        yield key
        if isinstance(key, str):
            folder, name = os.path.split(key)
            yield folder, folded(name)
