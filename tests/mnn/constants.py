"""Constants of a `.mnn` as they are stored."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sa3_convert.errors import ModelFileError, UsageError
from sa3_convert.mnn.file.contents import ModelStorage
from sa3_convert.mnn.file.flatbuffer import ModelBytes, unusable
from sa3_convert.mnn.file.storage import read_storage

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "fp16": np.dtype("<f2"),
    "fp32": np.dtype("<f4"),
    "fp64": np.dtype("<f8"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("u1"),
    "int16": np.dtype("<i2"),
    "uint16": np.dtype("<u2"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}


def constant_values(path: Path, name: str, *, storage: ModelStorage | None = None) -> NDArray[Any]:
    """Return a constant as it is stored: a read-only array in its own type and shape.

    Raises:
        ModelFileError: the file is damaged, or holds no values for it.
        UsageError: there is no such constant.

    """
    storage = storage or read_storage(path)
    found = next((constant for constant in storage.constants if constant.name == name), None)
    if found is None:
        raise UsageError(f"{path} has no constant {name!r}.")
    dtype = _DTYPES.get(found.type)
    if found.values is None or dtype is None or found.values.bytes != found.elements * dtype.itemsize:
        raise unusable(path, ModelFileError(f"it holds no readable values for constant {name!r} ({found.type})"))
    with ModelBytes(path) as model:
        values: NDArray[Any] = np.frombuffer(model.read(found.values), dtype)
        return values.reshape(found.shape)
