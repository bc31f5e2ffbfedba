"""Reference outputs, computed once and kept by what they depend on, in a folder of bounded size."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.system.machine import version_of
from sa3_convert.system.sealed import fingerprint, read_sealed, write_sealed

Arrays = dict[str, NDArray[Any]]

DEFAULT_LIMIT = 2 << 30

_LARGEST = 1 << 30
"""Bytes that an entry may have; the outputs of one inference are far below."""
_ENTRY = re.compile(r"[0-9a-f]{64}\.(safetensors|npz)")
"""Names of entries; earlier versions wrote `.npz`."""


def digest_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the hex SHA-256 of arrays: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class ReferenceStore:
    """Arrays by a fingerprint of everything that they were computed from.

    An entry is sealed, and holds numbers only: it is believed whole or computed again. Beyond `limit` bytes those that
    were not used for longest are dropped.
    """

    def __init__(self, folder: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = folder
        self.limit = limit
        self.computed = 0
        """How many entries were not there and had to be computed."""

    def get(self, compute: Callable[[], Mapping[str, NDArray[Any]]], **parts: Any) -> Arrays:
        """Return the arrays that belong to `parts`, computing them if they are not there or are damaged.

        Parts are JSON-ready, and are everything that the arrays depend on; the runtime's version is added.
        """
        from safetensors.numpy import save

        path = self.folder / f"{fingerprint(**parts, onnxruntime=version_of('onnxruntime'))}.safetensors"
        found = _read(path)
        if found is not None:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
            return found
        arrays = dict(compute())
        self.computed += 1
        write_sealed(path, save({name: np.asarray(array, order="C") for name, array in arrays.items()}))
        self._drop_oldest(path)
        return arrays

    def _drop_oldest(self, newest: Path) -> None:
        ours = []
        for file in self.folder.iterdir():
            # Another process may have dropped it.
            with contextlib.suppress(FileNotFoundError):
                if _ENTRY.fullmatch(file.name):
                    ours.append((file.stat().st_mtime, file.stat().st_size, file))
        total = 0
        for _, size, file in sorted(ours, reverse=True):
            total += size
            if total > self.limit and file != newest:
                file.unlink(missing_ok=True)


def _read(path: Path) -> Arrays | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return {name: array.copy() for name, array in load(read_sealed(path, _LARGEST)).items()}
    # A damaged entry is worth no more than a missing one: it is computed again.
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
