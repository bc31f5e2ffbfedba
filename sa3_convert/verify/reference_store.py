"""Reference outputs, computed once and kept by what they depend on, in a folder of bounded size."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.files import atomic_path
from sa3_convert.fingerprint import fingerprint, version_of
from sa3_convert.untrusted import open_regular

Arrays = dict[str, NDArray[Any]]

DEFAULT_LIMIT = 2 << 30
_DIGEST = "sha256"


def digest_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the hex SHA-256 of arrays: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class ReferenceStore:
    """Arrays by a fingerprint of everything that they were computed from.

    Args:
        folder: where they are kept; made when needed.
        limit: bytes; the entries that were not used for longest are dropped first.

    """

    def __init__(self, folder: Path, limit: int = DEFAULT_LIMIT) -> None:
        self._folder = folder
        self._limit = limit
        self.computed = 0
        """How many entries were not there and had to be computed."""

    def get(self, compute: Callable[[], Mapping[str, NDArray[Any]]], **parts: Any) -> Arrays:
        """Return the arrays that belong to `parts`, computing them if they are not there or are damaged.

        Args:
            compute: returns the arrays.
            **parts: JSON-ready; everything that the arrays depend on (the runtime's version is added).

        """
        path = self._folder / f"{fingerprint(**parts, onnxruntime=version_of('onnxruntime'))}.npz"
        found = _read(path)
        if found is not None:
            os.utime(path)
            return found
        arrays = dict(compute())
        self.computed += 1
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays, **{_DIGEST: np.array(digest_of(arrays))})  # type: ignore[arg-type]  # the stubs take names for options
        self._drop_oldest(path)
        return arrays

    def _drop_oldest(self, newest: Path) -> None:
        files = sorted(self._folder.glob("*.npz"), key=lambda file: file.stat().st_mtime, reverse=True)
        total = 0
        for file in files:
            total += file.stat().st_size
            if total > self._limit and file != newest:
                file.unlink()


def _read(path: Path) -> Arrays | None:
    try:
        with open_regular(path) as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        # zip's own sums are of 32 bits, and none is of the names.
        return arrays if str(arrays.pop(_DIGEST)) == digest_of(arrays) else None
    # A damaged entry is worth no more than a missing one: it is computed again.
    except Exception:  # what zipfile, zlib and numpy raise of damaged files has no type in common
        return None
