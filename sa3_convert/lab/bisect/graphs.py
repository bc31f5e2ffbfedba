"""The two graphs of a bisection: the reference, run in pieces, and what a `.mnn` says about a tensor."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto

from sa3_convert.arrays import Arrays
from sa3_convert.errors import ModelFileError
from sa3_convert.mnn.file.contents import ModelStorage, OperatorStorage
from sa3_convert.system.machine import default_threads

_GIVEN = "::given"
"""Suffix of a graph input that stands in for a tensor: the tensor itself may be computed in the same piece."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A float tensor that depends on the graph's inputs."""

    name: str
    index: int
    """Position of its operator in the graph's order."""
    operator: str
    bytes: int
    """Estimate at the lengths of the feeds."""


class ReferenceGraph:
    """Topology of an ONNX file; its weights stay on disk until a piece that uses them is run."""

    def __init__(self, path: Path, feeds: Arrays, threads: int | None = None) -> None:
        self._folder = path.parent
        self._threads = threads
        try:
            model = onnx.load(path, format="protobuf", load_external_data=False)
        except (OSError, DecodeError) as error:
            raise ModelFileError(f"{path} cannot be read as ONNX: {error}") from None
        # What is declared at a symbolic length would contradict the concrete one.
        del model.graph.value_info[:]
        self._model = model
        """Its structure: of the attributes, onnx-graphsurgeon cannot carry empty lists; `nodes` have them."""
        constants = {tensor.name for tensor in model.graph.initializer}
        self._inputs = [value.name for value in model.graph.input if value.name not in constants]
        self.nodes = copy.deepcopy(list(model.graph.node))
        self._producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.outputs = tuple(value.name for value in model.graph.output)
        self.tensors = self._float_tensors(feeds)
        for node in model.graph.node:
            inner = [attribute for attribute in node.attribute if _holds_graphs(attribute)]
            del node.attribute[:]
            node.attribute.extend(inner)

    def _float_tensors(self, feeds: Arrays) -> dict[str, Tensor]:
        known = _shapes(self._model, feeds)
        sizes = [size for kind, size in known.values() if kind == TensorProto.FLOAT and size is not None]
        dynamic = set(self._inputs)
        found = {}
        for index, node in enumerate(self.nodes):
            if dynamic.isdisjoint(node.input):
                continue
            dynamic.update(node.output)
            for name in node.output:
                kind, size = known.get(name, (TensorProto.UNDEFINED, None))
                if kind == TensorProto.FLOAT:
                    estimate = size if size is not None else max(sizes, default=0)
                    found[name] = Tensor(name, index, node.op_type, 4 * estimate)
        return found

    def segment(self, name: str, given: Collection[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return what computes a tensor: indices of the operators, and the nearest tensors before it in `given`."""
        operators: set[int] = set()
        sources: dict[str, None] = {}
        waiting = [self._producer[name]]
        while waiting:
            index = waiting.pop()
            if index in operators:
                continue
            operators.add(index)
            for source in self.nodes[index].input:
                if source in given:
                    sources[source] = None
                elif source in self._producer:
                    waiting.append(self._producer[source])
        return tuple(sorted(operators)), tuple(sorted(sources, key=lambda s: self._producer[s]))

    def inputs_of(self, operators: Sequence[int]) -> tuple[str, ...]:
        """Return the graph inputs that operators read."""
        read = {name for index in operators for name in self.nodes[index].input}
        return tuple(name for name in self._inputs if name in read)

    def run(self, outputs: Sequence[str], given: Mapping[str, NDArray[Any]], feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Compute tensors; whoever reads a tensor in `given` reads the value given, not the one computed.

        Every operator runs as it stands: graph optimisation is off.
        """
        piece = gs.import_onnx(self._model)
        tensors = piece.tensors()
        for name in given:
            piece.inputs.append(gs.Variable(name + _GIVEN, np.float32))
            for node in list(tensors[name].outputs):
                node.inputs[node.inputs.index(tensors[name])] = piece.inputs[-1]
        piece.outputs = [tensors[name] for name in outputs]
        piece.cleanup(remove_unused_graph_inputs=True)
        values = {**feeds, **{name + _GIVEN: value for name, value in given.items()}}
        used = {tensor.name: np.ascontiguousarray(values[tensor.name]) for tensor in piece.inputs}
        model = gs.export_onnx(piece, do_type_check=False)
        for node in model.graph.node:
            whole = self.nodes[self._producer[next(filter(None, node.output))]]
            node.attribute.extend(attribute for attribute in whole.attribute if not _holds_graphs(attribute))
        results = self._session(model).run(list(outputs), used)
        return dict(zip(outputs, results, strict=True))

    def _session(self, model: onnx.ModelProto) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False
        options.intra_op_num_threads = self._threads or default_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _holds_graphs(attribute: onnx.AttributeProto) -> bool:
    return attribute.HasField("g") or len(attribute.graphs) > 0


def _shapes(model: onnx.ModelProto, feeds: Arrays) -> dict[str, tuple[int, int | None]]:
    """Return element type and count of every tensor that shape inference knows, at the feeds' shapes."""
    concrete = onnx.ModelProto()
    concrete.CopyFrom(model)
    for value in concrete.graph.input:
        if value.name in feeds:
            dimensions = value.type.tensor_type.shape.dim
            for dimension, size in zip(dimensions, feeds[value.name].shape, strict=True):
                dimension.dim_value = size
    for value in concrete.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(concrete, data_prop=True)
    found: dict[str, tuple[int, int | None]] = {}
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        tensor = value.type.tensor_type
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        known = tensor.HasField("shape") and None not in sizes
        found[value.name] = (tensor.elem_type, int(np.prod([s or 0 for s in sizes])) if known else None)
    return found


_TABLE_TYPES = ("int8", "uint8")
_NAMES_ARE_NOT_VALUES = frozenset({"Const", "Input"})


class TargetGraph:
    """Operators of a file by the tensors that they make."""

    def __init__(self, storage: ModelStorage) -> None:
        main = [operator for operator in storage.operators if not operator.graph]
        self._producer = {
            name: operator
            for operator in main
            if operator.type not in _NAMES_ARE_NOT_VALUES
            for name in operator.outputs
        }
        self._constants = {c.name: c for c in storage.constants if not c.graph}
        self._half = "fp16" in storage.totals()

    @property
    def tensors(self) -> Collection[str]:
        """Names of all tensors that operators make."""
        return self._producer.keys()

    def operator(self, name: str) -> str:
        """Return MNN's name for the operator behind a tensor; layout conversions in between are skipped."""
        operator = self._producer[name]
        while operator.type in ("Reshape", "ConvertTensor") and operator.inputs:
            before = self._producer.get(operator.inputs[0])
            if before is None or (before.weight is None and before.type not in ("Reshape", "ConvertTensor")):
                break
            operator = before
        return operator.type if operator.function is None else f"{operator.type} {operator.function}"

    def stored(self, name: str, given: Collection[str]) -> str:
        """Return the coarsest type of the weights and constants between a tensor and the tensors in `given`."""
        kinds = {"fp32"}
        unpacked = False
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            tensor = waiting.pop()
            if tensor in seen:
                continue
            seen.add(tensor)
            operator = self._producer.get(tensor)
            if operator is not None:
                kinds |= self._kinds(operator)
                # Two numbers to a byte are taken apart with a floor, for which whole bytes have no use.
                unpacked |= operator.function == "floor"
                waiting += [source for source in operator.inputs if source not in given]
        coarsest = min(kinds, key=_bits)
        return "int4" if unpacked and coarsest in _TABLE_TYPES else coarsest

    def _kinds(self, operator: OperatorStorage) -> set[str]:
        kinds = set() if operator.weight is None else {operator.weight.type}
        # Among half floats, a norm's gain is rounded to half as well, although MNN stores it as float32.
        if self._half and operator.parameters:
            kinds.add("fp16")
        for source in operator.inputs:
            constant = self._constants.get(source)
            # Whole numbers of a table that is gathered from; int32 and int64 are shapes and indices.
            if constant is not None and (constant.is_float or constant.type in _TABLE_TYPES):
                kinds.add(constant.type)
        return kinds


def _bits(kind: str) -> int:
    return int(kind.lstrip("bfpuint"))
