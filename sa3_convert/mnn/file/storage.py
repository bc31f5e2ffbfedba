"""What a `.mnn` file holds, read from the file itself: neither MNN nor its opinion is asked.

Weights are located, not loaded: a 2 GB model takes a few megabytes of memory and well under a second. A damaged or
hostile file ends in `ModelFileError`, whatever its bytes are.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from sa3_convert.errors import ModelFileError
from sa3_convert.mnn.file.contents import ConstantStorage, ModelStorage, OperatorStorage, ParameterStorage, Port
from sa3_convert.mnn.file.flatbuffer import Extent, ModelBytes, Table, open_model, unusable, weight_path
from sa3_convert.mnn.file.schema import (
    BLOB_FIELDS,
    BLOB_VECTORS,
    DATA_TYPES,
    EXTRA_INFO_VERSION,
    FLOAT_VECTORS,
    FUNCTION_NUMBER,
    FUNCTIONS,
    OPERATOR_NAMES,
    SOURCES,
    Blob,
    Input,
    Kind,
    Net,
    Op,
    SubGraph,
)
from sa3_convert.mnn.file.weights import LayerWeights, layer_weights
from sa3_convert.system.checked_files import named

_INTEGER_LAYERS: Final = frozenset({"ConvInt8", "DepthwiseConvInt8"})
_MAX_RANK: Final = 16
"""MNN's own limit is nine dimensions."""
_PIECE: Final = 1 << 22


def read_storage(path: Path) -> ModelStorage:
    """Read what a model file holds.

    Args:
        path: any `.mnn`; weights in a `.weight` file beside it are found and checked against that file's size.

    Raises:
        ModelFileError: it is missing, damaged or not such a file; the message says what contradicts what.

    """
    try:
        with ModelBytes(path) as model:
            return _Reader(model).read()
    except ModelFileError as fault:
        raise unusable(named(path), fault) from None


def content_digest(path: Path) -> str:
    """Return the hex SHA-256 of a model, its `.weight` file included and the random identifier left out.

    MNN writes a random UUID into every file, so two conversions of the same graph differ in those 36 bytes; this
    digest is equal.
    """
    storage = read_storage(path)
    digest = hashlib.sha256()
    identity = storage.identity or Extent(0, 0)
    with open_model(path) as stream:
        position = 0
        while piece := bytearray(stream.read(_PIECE)):
            limits = (identity.offset, identity.offset + identity.bytes)
            start, end = (min(max(at - position, 0), len(piece)) for at in limits)
            piece[start:end] = bytes(end - start)
            digest.update(piece)
            position += len(piece)
    if storage.weight_file_bytes:
        with open_model(weight_path(path)) as stream:
            while plain := stream.read(_PIECE):
                digest.update(plain)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Graph:
    """Where an operator belongs: the graph's name and its tensors' names."""

    name: str
    tensors: tuple[str, ...]

    def named(self, indices: tuple[int, ...]) -> tuple[str, ...]:
        """Return tensors' names; an input left out (-1) has an empty one."""
        if not self.tensors:
            return tuple(f"#{index}" for index in indices)
        if any(index < -1 or index >= len(self.tensors) for index in indices):
            raise ModelFileError(f"an operator uses a tensor that is not among the {len(self.tensors)} there are")
        return tuple(self.tensors[index] if index >= 0 else "" for index in indices)


class _Reader:
    """One pass over a file."""

    def __init__(self, model: ModelBytes) -> None:
        self._model = model
        self._inputs: list[Port] = []
        self._operators: list[OperatorStorage] = []
        self._constants: list[ConstantStorage] = []

    def read(self) -> ModelStorage:
        net = self._model.buffer.root()
        main = _Graph("", net.strings(Net.TENSOR_NAMES))
        for table in net.tables(Net.OPERATORS):
            self._operator(table, main)
        if not self._operators:
            raise ModelFileError("it has no operators")
        for graph in net.tables(Net.SUBGRAPHS):
            name = graph.string(SubGraph.NAME) or "subgraph"
            inner = _Graph(name, graph.strings(SubGraph.TENSOR_NAMES))
            for table in graph.tables(SubGraph.OPERATORS):
                self._operator(table, inner)
        extra = net.table(Net.EXTRA_INFO)
        source = net.integer(Net.SOURCE, "b")
        return ModelStorage(
            path=self._model.path,
            bytes=self._model.size,
            weight_file_bytes=self._model.external_size,
            mnn_version=None if extra is None else extra.string(EXTRA_INFO_VERSION),
            source=SOURCES[source] if 0 <= source < len(SOURCES) else None,
            label=net.string(Net.LABEL),
            inputs=tuple(self._inputs),
            outputs=tuple(Port(name) for name in net.strings(Net.OUTPUT_NAMES) or self._loose_ends()),
            operators=tuple(self._operators),
            constants=tuple(self._constants),
            identity=net.extent(Net.UUID, 1),
        )

    def _loose_ends(self) -> Iterator[str]:
        """Yield what the main graph computes and nothing takes: the outputs of a file that does not name them."""
        taken = {name for operator in self._operators if not operator.graph for name in operator.inputs}
        for operator in self._operators:
            if not operator.graph:
                yield from (name for name in operator.outputs if name not in taken)

    def _operator(self, table: Table, graph: _Graph) -> None:
        number = table.integer(Op.TYPE)
        kind = table.integer(Op.PARAMETER_KIND, "B")
        outputs = graph.named(table.integers(Op.OUTPUTS))
        name = table.string(Op.NAME) or (outputs[0] if outputs else "")
        operator_type = OPERATOR_NAMES.get(number, f"#{number}")
        self._check_external_path(table)
        parameter = table.table(Op.PARAMETER)
        layer = LayerWeights(None, None)
        parameters: list[ParameterStorage] = []
        if parameter is not None:
            layer = layer_weights(self._model, kind, parameter, integer_layer=operator_type in _INTEGER_LAYERS)
            parameters = list(self._parameters(kind, parameter))
            if kind == Kind.BLOB:
                self._constants.append(self._constant(parameter, outputs[0] if outputs else name, graph.name))
            elif kind == Kind.INPUT and operator_type == "Input" and not graph.name:
                self._inputs.append(_input(parameter, outputs[0] if outputs else name))
        if layer.bias is not None:
            parameters.append(ParameterStorage("bias", "fp32", layer.bias.bytes // 4, layer.bias))
        self._operators.append(
            OperatorStorage(
                name=name,
                graph=graph.name,
                type=operator_type,
                parameter_kind=kind,
                function=_function(kind, parameter),
                inputs=graph.named(table.integers(Op.INPUTS)),
                outputs=outputs,
                weight=layer.weight,
                parameters=tuple(parameters),
            )
        )

    def _check_external_path(self, table: Table) -> None:
        path = table.string(Op.EXTERNAL_PATH)
        expected = weight_path(self._model.path).name
        if path and PurePath(path.replace("\\", "/")).name != expected:
            raise ModelFileError(f"it keeps weights in {path!r} instead of in {expected}")

    def _parameters(self, kind: int, table: Table) -> Iterator[ParameterStorage]:
        vectors = FLOAT_VECTORS.get(kind)
        if vectors is not None:
            external = () if vectors.external is None else table.integers(vectors.external, "q")
            sections = self._model.sections(external)
            for index, (field, role) in enumerate(vectors.fields.items()):
                values = table.extent(field, 4)
                if (values is None or not values.bytes) and index < len(sections):
                    values = sections[index]
                if values is not None and values.bytes:
                    yield ParameterStorage(role, "fp32", values.bytes // 4, values)
        for field in BLOB_FIELDS.get(kind, ()):
            blob = table.table(field)
            if blob is not None:
                constant = self._constant(blob, "", "")
                if constant.values is not None:
                    yield ParameterStorage("weights", constant.type, constant.elements, constant.values)

    def _constant(self, table: Table, name: str, graph: str) -> ConstantStorage:
        shape = table.integers(Blob.DIMENSIONS)
        if len(shape) > _MAX_RANK or any(size < 0 for size in shape):
            raise ModelFileError(f"constant {name!r} has the shape {list(shape[:_MAX_RANK])}")
        number = table.integer(Blob.TYPE, default=1)
        kind, size = DATA_TYPES.get(number, (f"type {number}", 0))
        elements = math.prod(shape)
        found: list[tuple[Extent, int]] = []
        for field, item in BLOB_VECTORS.items():
            values = table.extent(field, item)
            if values is not None and values.bytes:
                found.append((values, item))
        found.extend((section, size) for section in self._model.sections(table.integers(Blob.EXTERNAL, "q")))
        if not found or not elements:
            return ConstantStorage(name, graph, kind, shape, elements, None)
        values, item = found[0]
        if values.bytes not in (elements * size, elements * item) and size:
            raise ModelFileError(f"constant {name!r}, {kind} of shape {list(shape)}, has {values.bytes} bytes")
        return ConstantStorage(name, graph, kind, shape, elements, values)


def _input(table: Table, name: str) -> Port:
    number = table.integer(Input.TYPE, default=1)
    kind, _ = DATA_TYPES.get(number, (f"type {number}", 0))
    return Port(name, kind, table.integers(Input.DIMENSIONS))


def _function(kind: int, table: Table | None) -> str | None:
    names = FUNCTIONS.get(kind)
    if names is None or table is None:
        return None
    number = table.integer(FUNCTION_NUMBER)
    return names[number] if 0 <= number < len(names) else f"#{number}"
