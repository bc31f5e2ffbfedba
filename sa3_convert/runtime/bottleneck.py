"""The softnorm bottleneck between encoder and latents, as `bottleneck_params.json` describes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sa3_convert.errors import BundleError
from sa3_convert.untrusted import read_json

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """latents = (encoded · scaling_factor + bias) / running_std."""

    scaling_factor: Floats
    """[1, C, 1]."""
    bias: Floats
    """[1, C, 1]."""
    running_std: np.float32

    @classmethod
    def read(cls, path: Path, channels: int) -> Self:
        """Read `bottleneck_params.json`.

        Args:
            path: the file.
            channels: of the latents.

        Raises:
            BundleError: the file is missing or damaged, or its numbers cannot be what they are named after.

        """
        try:
            values = read_json(path)
            # What float32 does not hold becomes infinite, and is refused as such.
            with np.errstate(over="ignore"):
                scaling_factor, bias, running_std = (
                    np.array(values[key], dtype=np.float32) for key in ("scaling_factor", "bias", "running_std")
                )
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}. Convert again.") from None
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise BundleError(f"{path} is damaged: {type(error).__name__}: {error}. Convert again.") from None
        problem = _problem(scaling_factor, bias, running_std, channels)
        if problem:
            raise BundleError(f"{path} is damaged: {problem}. Convert again.")
        return cls(scaling_factor, bias, np.float32(running_std[0]))

    def encode(self, encoded: Floats) -> Floats:
        """Return latents [B, C, T] for what the encoder gives, [B, C, T]."""
        latents: Floats = (encoded * self.scaling_factor + self.bias) / self.running_std
        return latents


def _problem(scaling_factor: NDArray[Any], bias: NDArray[Any], running_std: NDArray[Any], channels: int) -> str | None:
    for name, array in (("scaling_factor", scaling_factor), ("bias", bias)):
        if array.shape != (1, channels, 1):
            return f"{name} has shape {list(array.shape)}, expected [1, {channels}, 1]"
    if running_std.shape != (1,) or not running_std[0] > 0:
        return f"running_std is {running_std.tolist()}, expected one positive number"
    if not all(np.isfinite(array).all() for array in (scaling_factor, bias, running_std)):
        return "it holds numbers that are not finite"
    return None
