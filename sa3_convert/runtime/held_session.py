"""A model of a bundle, held to two things: the file that was checked, and the layout in the manifest."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from sa3_convert.components import Contract, Length, Port
from sa3_convert.errors import ModelFileError
from sa3_convert.files import CheckedFile, named
from sa3_convert.session import Arrays, Session


class HeldSession:
    """Runs a session whose file must be what was checked, and whose arrays must be what the contract says.

    Args:
        session: just loaded, by name.
        files: what it was loaded from.
        contract: of the component, by the bundle's layout.

    Raises:
        BundleError: a file was replaced between its check and now.

    """

    def __init__(self, session: Session, files: Sequence[CheckedFile], contract: Contract) -> None:
        self._session = session
        self._files = files
        self._contract = contract
        self._name = named(files[0].path)
        for file in files:
            file.require_unchanged()

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; see `sa3_convert.session.Session.run`.

        Raises:
            ValueError: the feeds are not what the contract says.
            ModelFileError: the model does not take them, or gives something else than the contract says.
            BundleError: weights that are read as they are needed were replaced.

        """
        length = _length(self._contract.inputs, feeds)
        try:
            results = self._session.run(feeds)
        except ValueError as error:
            raise self._other_model(str(error)) from None
        for file in self._files:
            if file.companion is not None:
                file.companion.require_unchanged()
        for port in self._contract.outputs:
            array = results.get(port.name)
            expected = port.concrete(length)
            if array is None or array.shape != expected or str(array.dtype) != port.dtype:
                found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
                raise self._other_model(f"{port.name} is {found}, expected {port.dtype} {list(expected)}")
        return results

    def close(self) -> None:
        """Free the model."""
        close = getattr(self._session, "close", None)
        if close is not None:
            close()

    def _other_model(self, why: str) -> ModelFileError:
        return ModelFileError(
            f"{self._name} is not the model that the bundle's layout describes: {why.rstrip('.')}. Convert again."
        )


def _length(ports: Sequence[Port], feeds: Arrays) -> int:
    """Return T of the feeds, 0 where there is none, and hold them to what they should be."""
    if feeds.keys() != {port.name for port in ports}:
        raise ValueError(f"the model takes {', '.join(port.name for port in ports)}, not {', '.join(feeds)}")
    lengths = {
        size // dimension.factor
        for port in ports
        for size, dimension in zip(feeds[port.name].shape, port.shape, strict=False)
        if isinstance(dimension, Length)
    }
    length = max(lengths, default=0)
    for port in ports:
        array = feeds[port.name]
        if array.shape != port.concrete(length) or str(array.dtype) != port.dtype:
            raise ValueError(f"{port.name} is {array.dtype} {list(array.shape)}, expected {port.dtype} {port.shape}")
    return length
