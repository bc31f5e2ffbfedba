"""A model's bytes: the `.mnn`, memory-mapped, and the `.weight` file beside it that MNN makes of large models."""

import mmap
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from sa3_convert.errors import ModelFileError
from sa3_convert.files import named
from sa3_convert.mnn.flatbuffer import Buffer, Extent
from sa3_convert.untrusted import NotAFileError, open_regular

_SMALLEST: Final = 12
WEIGHTS: Final = ".weight"
"""Behind a model's name: the file beside it that has its weights, where it is too large for one."""


def weight_path(model: Path) -> Path:
    """Return where MNN keeps the weights of a model that is too large for one file."""
    return model.with_name(model.name + WEIGHTS)


def unusable(path: Path, fault: ModelFileError) -> ModelFileError:
    """Return the error for the user: which file, what is wrong with it, what to do."""
    return ModelFileError(f"{path} cannot be used as an MNN model: {fault}. Convert it or fetch it again.")


class ModelBytes:
    """An open model file. Reads what it is asked for and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._external: BinaryIO | None = None
        self.external_size = 0

    def __enter__(self) -> Self:
        with open_model(self.path) as stream:
            self.size = stream.seek(0, 2)
            if self.size < _SMALLEST:
                raise ModelFileError(f"it has only {self.size} bytes")
            if self.size % 4:
                raise ModelFileError(f"it was cut off or added to: {self.size} bytes are no whole number of words")
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.buffer = Buffer(self._map)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._map is not None:
            self._map.close()
        if self._external is not None:
            self._external.close()

    def sections(self, numbers: Sequence[int]) -> tuple[Extent, ...]:
        """Return the consecutive parts of the `.weight` file that [offset, bytes, bytes, …] names.

        Raises:
            ModelFileError: the file is missing or too short.

        """
        if not numbers:
            return ()
        self._open_external()
        offset, *sizes = numbers
        found = []
        for size in sizes:
            if offset < 0 or size < 0 or offset + size > self.external_size:
                raise ModelFileError(
                    f"it keeps weights in bytes {offset} to {offset + size} of {weight_path(self.path).name}, "
                    f"which has {self.external_size}"
                )
            found.append(Extent(offset, size, external=True))
            offset += size
        return tuple(found)

    def read(self, extent: Extent, start: int = 0, size: int | None = None) -> bytes:
        """Return a copy of (part of) an extent.

        Raises:
            ModelFileError: it ends earlier.

        """
        size = extent.bytes - start if size is None else size
        if start < 0 or size < 0 or start + size > extent.bytes:
            raise ModelFileError("a weight ends before its own description does")
        position = extent.offset + start
        if not extent.external:
            assert self._map is not None
            return self._map[position : position + size]
        stream = self._open_external()
        stream.seek(position)
        data = stream.read(size)
        if len(data) != size:
            raise ModelFileError(f"{weight_path(self.path).name} became shorter while it was read")
        return data

    def _open_external(self) -> BinaryIO:
        if self._external is None:
            self._external = open_model(weight_path(self.path))
            self.external_size = self._external.seek(0, 2)
        return self._external


def open_model(path: Path) -> BinaryIO:
    """Open a file for reading; a directory, a pipe or a device is refused before it can block.

    Raises:
        ModelFileError: there is no such file, or it is none.

    """
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise ModelFileError(f"{named(path)} does not exist") from None
    except NotAFileError:
        raise ModelFileError(f"{named(path)} is not a file") from None
    except OSError as error:
        raise ModelFileError(f"{named(path)} cannot be opened: {error.strerror}") from None
