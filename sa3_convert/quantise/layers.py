"""The layers of an ONNX graph whose weights MNN's converter quantises, and how to get at those weights.

MNN quantises convolutions, and MatMul and Gemm with a constant 2-D weight (they become 1x1 convolutions). A weight that
more than four MatMuls share stays float; so does a 3-D constant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from sa3_convert.mnn.layer_rules import LIFTED_SUFFIX
from sa3_convert.quantise.grid import Floats

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
    def input_name(self) -> str:
        """Name of the activation that the weight is multiplied with."""
        value = self.node.inputs[0]
        assert value is not None
        assert value.name is not None
        return value.name

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
