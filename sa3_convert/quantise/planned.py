"""Weights that were rounded ahead of the conversion, by layer name, in a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sa3_convert.errors import ConversionError
from sa3_convert.quantise.grid import Floats


@dataclass(frozen=True, slots=True)
class PlannedWeights:
    """A file of weights [out, in] float32, each on the grid of the model that will be written."""

    path: Path

    @classmethod
    def write(cls, path: Path, weights: Mapping[str, Floats]) -> "PlannedWeights":
        """Keep weights by layer name in a safetensors file."""
        save_file(dict(weights), path)
        return cls(path)

    def names(self) -> frozenset[str]:
        """Return the layers that it holds.

        Raises:
            ConversionError: the file is missing or damaged.

        """
        try:
            with safe_open(self.path, "numpy") as file:
                return frozenset(file.keys())
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from None

    def read(self, layer: str) -> Floats:
        """Return one layer's weight.

        Raises:
            ConversionError: the file is missing or damaged, or does not hold it.

        """
        try:
            with safe_open(self.path, "numpy") as file:
                weight: Floats = file.get_tensor(layer)
                return weight
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> ConversionError:
        return ConversionError(f"Rounded weights {self.path} cannot be read: {error}. Convert again.")
