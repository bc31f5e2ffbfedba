"""Results of stages by fingerprint: a folder per result, complete or absent.

An entry is built under a temporary name and takes its place by one rename, so a process that is killed leaves at most
a folder that nobody reads and that the next run removes. Files are checked against their hashes whenever they are used.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_convert.files import partial_folder, sha256_file, sweep

_ENTRY = "entry.json"


def cache_beside(bundle: Path) -> Path:
    """Return where stages are kept unless told otherwise: bundles in one folder share them."""
    return bundle.absolute().parent / ".sa3-convert-cache"


@dataclass(frozen=True, slots=True)
class CachedResult:
    """One stage's result: its files and what was noted about them."""

    folder: Path
    files: dict[str, str]
    """SHA-256 by file name."""
    notes: dict[str, Any]

    def file(self, name: str) -> Path:
        """Return the path of one of its files."""
        return self.folder / name


class StageCache:
    """A folder of stage results."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, stage: str, key: str) -> CachedResult | None:
        """Return the whole, undamaged result of a stage, or None; a damaged one is removed."""
        folder = self._root / stage / key
        try:
            entry = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
            files, notes = dict(entry["files"]), dict(entry["notes"])
            whole = all(sha256_file(folder / name) == digest for name, digest in files.items())
        except FileNotFoundError:
            whole = False
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return CachedResult(folder, files, notes)

    def has(self, stage: str, key: str) -> bool:
        """Tell whether a result is there, without reading its files; `get` finds out whether it is whole."""
        return (self._root / stage / key / _ENTRY).exists()

    def drop(self, stage: str, key: str) -> None:
        """Forget a result, so that it is made again."""
        shutil.rmtree(self._root / stage / key, ignore_errors=True)

    def get(self, stage: str, key: str, make: Callable[[Path], dict[str, Any]]) -> tuple[CachedResult, bool]:
        """Return a stage's result and whether it was there already.

        Args:
            stage: name of the stage.
            key: fingerprint of everything that the result depends on.
            make: puts the result's files into the empty folder it is given and returns notes (JSON-ready).

        """
        found = self.find(stage, key)
        if found is not None:
            return found, True
        place = self._root / stage / key
        with partial_folder(place) as temporary:
            notes = make(temporary)
            files = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
            entry = {"files": files, "notes": notes}
            (temporary / _ENTRY).write_text(json.dumps(entry, indent=1, allow_nan=False), encoding="utf-8")
            with contextlib.suppress(OSError):
                # Another process finished the same result first; by fingerprint it is as good.
                temporary.rename(place)
            return CachedResult(place, files, notes), False

    def sweep(self) -> None:
        """Remove what processes that are gone have left."""
        for stage in self._root.glob("*/"):
            sweep(stage)
