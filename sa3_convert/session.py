"""The one way to run a model file, whatever runs it: named arrays in, named arrays out."""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

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
