"""Tensors in a file without a name that is mapped: in memory only while they are used."""

import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_PIECE: Final = 1 << 22


class Scratch:
    """Room for float32 tensors that stand in no file as they are used.

    Args:
        folder: where there is space for them; the system's own for temporary files when not given.

    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as its tensors

    def kept(self, tensor: "Tensor") -> "Tensor":
        """Return a mapped tensor of the same values; half precision is widened, which is exact, piece by piece."""
        import torch

        if not tensor.numel():
            return tensor.to(torch.float32)
        offset = self._file.seek(0, 2)
        flat = tensor.contiguous().view(-1)
        for start in range(0, flat.numel(), _PIECE):
            self._file.write(flat[start : start + _PIECE].to(torch.float32).numpy().data)
        self._file.flush()
        mapped = np.memmap(self._file, np.float32, "c", offset, tuple(tensor.shape))
        return torch.from_numpy(mapped)
