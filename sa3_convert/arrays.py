"""What passes between models: named float arrays, and the one interface by which any engine runs a model file."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

Arrays = Mapping[str, NDArray[Any]]


class Session(Protocol):
    """A loaded model. Implementations: `mnn.session.MnnSession`, `ort.OrtSession`, `runtime.engines.torch_engine`."""

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once.

        Args:
            feeds: one array per input name; dynamic lengths may differ between calls.

        Returns:
            One array per output name, owned by the caller.

        """
        ...
