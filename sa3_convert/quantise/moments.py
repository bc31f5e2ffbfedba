"""Second moments of what reaches each linear in use."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sa3_convert.quantise.grid import Floats

Moments = Mapping[str, NDArray[np.float32]]
"""Σ x·xᵀ per layer name, [in, in] float32, over the positions that mean something."""


def local_energy(difference: Floats, moments: NDArray[np.float32] | None) -> float:
    """Return tr(ΔW·M·ΔWᵀ); without moments (a convolution with a kernel) the inputs count as white."""
    flat = difference.reshape(difference.shape[0], -1)
    if moments is None:
        return float(np.square(flat, dtype=np.float64).sum())
    return float(np.einsum("ij,ij->", flat @ moments, flat, dtype=np.float64))
