"""What passes between models: named float arrays, and the one interface by which any engine runs a model file."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

Arrays = Mapping[str, NDArray[Any]]


class Session(Protocol):
    """A loaded model; whoever loaded it hands it to `free` in the end."""

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once.

        Args:
            feeds: one array per input name; dynamic lengths may differ between calls.

        Returns:
            One array per output name, owned by the caller.

        """
        ...


def free(session: Session) -> None:
    """Let go of a model, if it is of a kind that has to be closed."""
    close = getattr(session, "close", None)
    if close is not None:
        close()
