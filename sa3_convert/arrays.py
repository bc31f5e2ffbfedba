"""What passes between models: named float arrays, and the one interface by which any engine runs a model file."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

Arrays = Mapping[str, NDArray[Any]]

T = TypeVar("T")


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


def constant(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view that nobody can write through: what stays the same from run to run, so that it is sent once."""
    view = array.view()
    view.flags.writeable = False
    return view


_KEPT = 16
"""Constants of a model under two conditions, between which guidance alternates."""


class Placed(Generic[T]):
    """Puts arrays where a session works; of a constant that it was handed before it returns what stands there."""

    def __init__(self, place: Callable[[NDArray[Any]], T]) -> None:
        self._place = place
        self._kept: OrderedDict[int, tuple[NDArray[Any], T]] = OrderedDict()

    def __call__(self, array: NDArray[Any]) -> T:
        """Return an array where it is worked with."""
        if array.flags.writeable:
            return self._place(array)
        # The array is kept too, so that no other can get its identity.
        found = self._kept.get(id(array)) or (array, self._place(array))
        self._kept[id(array)] = found
        self._kept.move_to_end(id(array))
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found[1]
