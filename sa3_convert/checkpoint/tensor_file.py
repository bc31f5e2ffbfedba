"""One safetensors file: what it holds, held to what it should hold, and its bytes in bounded pieces.

The header is parsed and checked by the safetensors library. Values are mapped for use (`tensors`) and read piecewise
for checks and hashes, so that neither costs memory.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from sa3_convert.checkpoint.tensors import Shape, StoredType, TensorSpec
from sa3_convert.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 23
_SHOWN = 5
_LFS_POINTER = b"version https://git-lfs"
_STORED_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
# All exponent bits set: an infinity or a NaN, whatever the mantissa.
_EXPONENT: Mapping[str, int] = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where and how a tensor stands in its file."""

    stored: str
    shape: Shape
    offset: int
    nbytes: int


def refuse_pointer(path: Path) -> None:
    """Refuse a git-lfs pointer, which stands where a file's content was not downloaded.

    Raises:
        CheckpointError: `path` is missing, not a file, unreadable or such a pointer.

    """
    if not path.is_file():
        raise CheckpointError(f"{path} is {'not a file' if path.exists() else 'missing'}.")
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if start == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself. Run `git lfs pull` in {path.parent}, "
            "or download the checkpoint with `sa3-convert checkpoint fetch`."
        )


class TensorFile:
    """An open safetensors file whose header is sound."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            CheckpointError: it is missing, a git-lfs pointer, truncated, or not such a file.

        """
        refuse_pointer(path)
        self.path = path
        try:
            with safe_open(path, "np") as file:
                names = file.offset_keys()
                slices = {name: file.get_slice(name) for name in names}
                self.metadata: Mapping[str, str] = file.metadata() or {}
                found = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) is truncated, damaged or no safetensors file: {error}. "
                "Download it again."
            ) from None
        self.entries = self._located(found)

    def _located(self, found: Mapping[str, tuple[str, Shape]]) -> dict[str, StoredTensor]:
        entries = {}
        with self.path.open("rb") as stream:
            offset = 8 + int.from_bytes(stream.read(8), "little")
        # The library has checked that the tensors follow one another without gaps up to the file's end.
        for name, (stored, shape) in found.items():
            if stored not in _STORED_BYTES:
                raise CheckpointError(
                    f"{self.path}: {name} is stored as {stored}; only {', '.join(get_args(StoredType))} are supported."
                )
            nbytes = math.prod(shape) * _STORED_BYTES[stored]
            entries[name] = StoredTensor(stored, shape, offset, nbytes)
            offset += nbytes
        return entries

    def require(self, expected: Mapping[str, TensorSpec], *, within: str = "") -> None:
        """Hold the file to exactly the tensors of `expected`.

        Args:
            expected: name → shape; any floating type that is supported will do.
            within: names that do not start with this are nobody's business.

        Raises:
            CheckpointError: tensors are missing, extra or of another shape; the message names the first few.

        """
        found = {name: entry for name, entry in self.entries.items() if name.startswith(within)}
        problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
        problems += [f"{name} is not known" for name in sorted(found.keys() - expected.keys())]
        for name in sorted(expected.keys() & found.keys()):
            wanted, shape = expected[name].shape, found[name].shape
            if wanted != shape:
                problems.append(f"{name} has shape {list(shape)}, expected {list(wanted)}")
        if problems:
            rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise CheckpointError(
                f"{self.path} does not fit its configuration: {'; '.join(problems[:_SHOWN])}{rest}. "
                "Are the files of one checkpoint, and complete?"
            )

    def tensors(self, names: Mapping[str, str]) -> "dict[str, Tensor]":
        """Return tensors as float32; those that are stored so are views of the mapped file.

        Args:
            names: name in the file → name in the result.

        """
        import torch

        with safe_open(self.path, "pt") as file:
            return {to: file.get_tensor(name).to(torch.float32) for name, to in names.items()}

    def _pieces(self, name: str) -> Iterator[bytes]:
        entry = self.entries[name]
        left = entry.nbytes
        with self.path.open("rb") as stream:
            stream.seek(entry.offset)
            while left:
                piece = stream.read(min(left, _PIECE))
                if not piece:
                    raise CheckpointError(f"{self.path} has become shorter while it was read.")
                left -= len(piece)
                yield piece

    def sha256(self, name: str) -> str:
        """Return the hex SHA-256 of a tensor's bytes as stored."""
        digest = hashlib.sha256()
        for piece in self._pieces(name):
            digest.update(piece)
        return digest.hexdigest()

    def require_finite(self, name: str) -> None:
        """Check a tensor's values.

        Raises:
            CheckpointError: one is infinite or not a number; the message gives its index.

        """
        entry = self.entries[name]
        exponent = _EXPONENT[entry.stored]
        start = 0
        for piece in self._pieces(name):
            bits: NDArray[np.unsignedinteger] = np.frombuffer(piece, f"<u{_STORED_BYTES[entry.stored]}")
            bad = (bits & exponent) == exponent
            if bad.any():
                index = [int(i) for i in np.unravel_index(start + int(bad.argmax()), entry.shape)]
                raise CheckpointError(
                    f"{self.path}: {name}{index} is not a finite number. The file is damaged or the training "
                    "diverged; download it again or take another checkpoint."
                )
            start += bits.size
