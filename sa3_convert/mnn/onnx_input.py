"""Look at an ONNX file before MNN's converter does: it accepts missing, truncated and unreadable ones in silence."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sa3_convert.errors import ConversionError

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

# MNN computes with float32 and int32 and takes everything else as one of them.
_MNN_DTYPES: Final = {
    "FLOAT": "float32",
    "FLOAT16": "float32",
    "DOUBLE": "float32",
    "INT32": "int32",
    "INT64": "int32",
    "BOOL": "int32",
    "UINT8": "uint8",
}
# Half-precision external data converts without an error, and then either does not load or gives zeros.
_EXTERNAL_TYPES: Final = ("FLOAT", "DOUBLE", "INT8", "UINT8", "INT32", "INT64", "BOOL")


@dataclass(frozen=True, slots=True)
class Ports:
    """Inputs with (dtype, shape; -1 is dynamic) and the names of the outputs."""

    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: frozenset[str]

    def difference(self, found: "Ports") -> str:
        """Say in words how a converted file's ports differ from these; empty if they do not."""
        problems = []
        for name, port in self.inputs.items():
            if name not in found.inputs:
                problems.append(f"input {name!r} is gone")
            elif found.inputs[name] != port:
                problems.append(f"input {name!r} is {_described(found.inputs[name])} instead of {_described(port)}")
        problems += [f"input {name!r} has appeared" for name in found.inputs if name not in self.inputs]
        problems += [f"output {name!r} is gone" for name in sorted(self.outputs - found.outputs)]
        problems += [f"output {name!r} has appeared" for name in sorted(found.outputs - self.outputs)]
        return "; ".join(problems)


@dataclass(frozen=True, slots=True)
class OnnxInput:
    """An ONNX file that the converter can be given."""

    path: Path
    ports: Ports
    outputs: tuple[str, ...]
    """Of all its nodes."""
    bytes: int
    """Of the file and its external data."""


def read_onnx_input(path: Path) -> OnnxInput:
    """Check that an ONNX file and its external data are whole and none that MNN misreads; weights are not read."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ConversionError(f"{path} does not exist; there is nothing to convert. Export the checkpoint first.")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise ConversionError(f"{path} is not an ONNX file, or is truncated ({error}). Export it again.") from None
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}.") from None
    if not model.opset_import or not model.graph.output:
        raise ConversionError(f"{path} is truncated: it holds no complete graph. Export it again.")
    outputs = tuple(name for node in model.graph.node for name in node.output)
    return OnnxInput(path, _ports(path, model), outputs, path.stat().st_size + _external_bytes(path, model))


def _ports(path: Path, model: "ModelProto") -> Ports:
    from onnx import TensorProto

    initial = {tensor.name for tensor in model.graph.initializer}
    inputs = {}
    for value in model.graph.input:
        if value.name in initial:
            continue
        kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        if kind not in _MNN_DTYPES:
            raise ConversionError(f"{path}: input {value.name!r} is {kind}, which MNN cannot take.")
        shape = tuple(
            dim.dim_value if dim.WhichOneof("value") == "dim_value" else -1 for dim in value.type.tensor_type.shape.dim
        )
        inputs[value.name] = (_MNN_DTYPES[kind], shape)
    return Ports(inputs, frozenset(value.name for value in model.graph.output))


def _external_bytes(path: Path, model: "ModelProto") -> int:
    """Return the size of all external data; every piece of it must be there."""
    from onnx.external_data_helper import uses_external_data

    files: dict[Path, int] = {}
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            file, needed = _external_extent(path, tensor)
            files[file] = max(needed, files.get(file, 0))
    for file, needed in files.items():
        if not file.is_file():
            raise ConversionError(f"{file} is missing: {path.name} keeps its weights there. Export it again.")
        if (size := file.stat().st_size) < needed:
            raise ConversionError(f"{file} is truncated: it has {size} bytes, {path.name} needs {needed}.")
    return sum(file.stat().st_size for file in files)


def _external_extent(path: Path, tensor: "TensorProto") -> tuple[Path, int]:
    from onnx import TensorProto, helper

    kind = TensorProto.DataType.Name(tensor.data_type)
    if kind not in _EXTERNAL_TYPES:
        raise ConversionError(
            f"{path}: {tensor.name!r} is {kind} external data, which MNN's converter misreads. Store it as FLOAT; "
            "`floats: fp16` in the recipe makes the converter halve it."
        )
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset = int(entries.get("offset", 0))
        item = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        count = 1
        for dim in tensor.dims:
            count *= dim
        length = int(entries.get("length", count * item))
        location = entries["location"]
    except (KeyError, ValueError) as error:
        raise ConversionError(f"{path}: {tensor.name!r} has a damaged reference to external data ({error}).") from None
    if length != count * item:
        raise ConversionError(f"{path}: {tensor.name!r} has {length} bytes of external data, its shape {count * item}.")
    return path.parent / location, offset + length


def _described(port: tuple[str, tuple[int, ...]]) -> str:
    return f"{port[0]} {list(port[1])}"
