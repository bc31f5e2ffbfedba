"""What passes between models: named float arrays, and the one interface by which any engine runs a model file."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

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


@dataclass(frozen=True, slots=True)
class Placed(Generic[T]):
    """Puts constants where a session works; of one that it was handed before it returns what stands there."""

    place: Callable[[NDArray[Any]], T]
    kept: OrderedDict[int, tuple[NDArray[Any], T]] = field(default_factory=OrderedDict)

    def __call__(self, array: NDArray[Any]) -> T:
        """Return an array, which nobody can write into, where it is worked with."""
        # The array is kept too, so that no other can get its identity.
        found = self.kept.get(id(array)) or (array, self.place(array))
        self.kept[id(array)] = found
        self.kept.move_to_end(id(array))
        if len(self.kept) > _KEPT:
            self.kept.popitem(last=False)
        return found[1]


def host(array: Any) -> NDArray[Any]:
    """Return an array in the processor's memory: itself, or what lies on a device, in one copy."""
    if isinstance(array, np.ndarray):
        return array
    if array.device.type == "cpu":
        return np.asarray(array)
    # From the device straight into pinned memory, which is what it can write to.
    return np.asarray(array.new_empty(array.shape, device="cpu", pin_memory=True).copy_(array))


def placed_like(array: NDArray[Any], other: Any) -> Any:
    """Return an array where another is worked with."""
    return array if isinstance(other, np.ndarray) else other.new_tensor(array)


def double(values: Any) -> Any:
    """Return float64 copies, where they are: sums over whole latents need them."""
    return values.astype(np.float64) if isinstance(values, np.ndarray) else values.double()


def typed_like(values: Any, other: Any) -> Any:
    """Return values in the type of another array."""
    return values.astype(other.dtype) if isinstance(values, np.ndarray) else values.to(other.dtype)
