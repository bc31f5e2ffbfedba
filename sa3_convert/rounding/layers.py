"""The layers of an ONNX graph whose weights MNN's converter rounds, and files of weights rounded ahead of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sa3_convert.arrays import Floats
from sa3_convert.errors import ConversionError
from sa3_convert.mnn.layer_rules import LIFTED_SUFFIX

_SHARED_TOO_OFTEN: Final = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """One quantisable layer."""

    name: str
    """Name of the ONNX output, which recipes' rules match."""
    node: ir.Node
    weight: ir.Value
    transposed: bool
    """Whether the graph holds [in, out], as a MatMul does, instead of [out, in, *kernel]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as [out, in, *kernel]."""
        tensor = self.weight.const_value
        assert tensor is not None
        shape = tuple(tensor.shape.numpy())
        return shape[::-1] if self.transposed else shape

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear over the last dimension of its input (not a convolution)."""
        return self.node.op_type != "Conv"

    def read(self) -> Floats:
        """Return the weight as [out, in, *kernel] float32."""
        tensor = self.weight.const_value
        assert tensor is not None
        values = np.asarray(tensor.numpy(), dtype=np.float32)
        return np.ascontiguousarray(values.T) if self.transposed else values

    def replace(self, rewrite: Callable[[Floats], Floats]) -> None:
        """Put `rewrite(weight)` in the weight's place; it is computed when the graph is saved, one layer at a time."""
        original = self.weight.const_value
        assert original is not None
        transposed = self.transposed

        def evaluate() -> ir.TensorProtocol:
            values = np.array(original.numpy(), dtype=np.float32)
            if isinstance(original, ir.ExternalTensor):
                original.release()  # what was mapped would stay resident: in the end, the whole model
            rewritten = rewrite(np.ascontiguousarray(values.T) if transposed else values)
            return ir.Tensor(np.ascontiguousarray(rewritten.T if transposed else rewritten), name=original.name)

        self.weight.const_value = ir.LazyTensor(
            evaluate, dtype=ir.DataType.FLOAT, shape=ir.Shape(original.shape.numpy()), name=original.name
        )


def quantisable_layers(model: ir.Model) -> list[Layer]:
    """Return the graph's quantisable layers, in graph order."""
    layers = []
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or not weight.is_initializer():
            continue
        rank = len(weight.const_value.shape)
        if (node.op_type == "Conv") != (rank > 2) or rank < 2 or len(weight.uses()) > _SHARED_TOO_OFTEN:
            continue
        name = node.outputs[0].name
        assert name is not None
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _flag(node, "transB"))
        layers.append(Layer(name.removesuffix(LIFTED_SUFFIX), node, weight, transposed))
    return layers


def _flag(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


@dataclass(frozen=True, slots=True)
class PlannedWeights:
    """A file of weights [out, in] float32, each on the grid of the model that will be written."""

    path: Path

    @classmethod
    def write(cls, path: Path, weights: Mapping[str, Floats]) -> "PlannedWeights":
        """Keep weights by layer name in a safetensors file."""
        save_file(dict(weights), path)
        return cls(path)

    def names(self) -> frozenset[str]:
        """Return the layers that it holds; a missing or damaged file is a ConversionError, as for `read`."""
        try:
            with safe_open(self.path, "numpy") as file:
                return frozenset(file.keys())
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from None

    def read(self, layer: str) -> Floats:
        """Return one layer's weight."""
        try:
            with safe_open(self.path, "numpy") as file:
                weight: Floats = file.get_tensor(layer)
                return weight
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> ConversionError:
        return ConversionError(f"Rounded weights {self.path} cannot be read: {error}. Convert again.")
