"""Second moments of what reaches each linear in use, in memory and in a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sa3_convert.errors import ConversionError
from sa3_convert.quantise.grid import Floats

Moments = Mapping[str, NDArray[np.float32]]
"""Σ x·xᵀ per layer name, [in, in] float32, over the positions that mean something."""

_FIT: Final = "fit/"
_CHECK: Final = "check/"


def local_energy(difference: Floats, moments: NDArray[np.float32] | None) -> float:
    """Return tr(ΔW·M·ΔWᵀ); without moments (a convolution with a kernel) the inputs count as white."""
    flat = difference.reshape(difference.shape[0], -1)
    if moments is None:
        return float(np.square(flat, dtype=np.float64).sum())
    return float(np.einsum("ij,ij->", flat @ moments, flat, dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Calibration:
    """Second moments of each linear's inputs: of one set of samples to fit on, of another to check with."""

    path: Path

    @classmethod
    def write(cls, path: Path, fit: Moments, check: Moments) -> "Calibration":
        """Keep moments in a file that is mapped when they are needed; what layers share is there once.

        Args:
            path: the safetensors file.
            fit: moments to fit on.
            check: moments of the same layers, of other samples.

        """
        keepers: dict[int, str] = {}
        kept_by = {layer: keepers.setdefault(id(value), layer) for layer, value in fit.items()}
        tensors = {_FIT + name: fit[name] for name in keepers.values()}
        save_file(tensors | {_CHECK + name: check[name] for name in keepers.values()}, path, metadata=kept_by)
        return cls(path)

    def of(self, layer: str) -> tuple[NDArray[np.float64], NDArray[np.float32]] | None:
        """Return the moments to fit on and those to check with, or None for a layer that has none.

        Raises:
            ConversionError: the file is missing or damaged.

        """
        try:
            with safe_open(self.path, "numpy") as file:
                keeper = (file.metadata() or {}).get(layer)
                if keeper is None:
                    return None
                return file.get_tensor(_FIT + keeper).astype(np.float64), file.get_tensor(_CHECK + keeper)
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"Calibration {self.path} cannot be read: {error}. Convert again.") from None
