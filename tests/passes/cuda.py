"""What MNN's CUDA back-end is suspected to compute, from its source, as an evaluator of ONNX graphs in NumPy.

- A unary operator on int32 runs the float kernel on the integer's bits: Abs clears the sign bit of two's complement, so
  |−1| is 2147483647.
- Precision normal rounds the inputs of every Linear to half; beyond 65504 that is infinity.
"""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Feeds = dict[str, NDArray[Any]]


class Abs(OpRun):
    def _run(self, x: NDArray[Any]) -> tuple[NDArray[Any]]:
        if x.dtype != np.int32:
            return (np.abs(x),)
        return (np.abs(x.view(np.float32)).view(np.int32),)


class Neg(OpRun):
    def _run(self, x: NDArray[Any]) -> tuple[NDArray[Any]]:
        if x.dtype != np.int32:
            return (np.negative(x),)
        return (np.negative(x.view(np.float32)).view(np.int32),)


class MatMul(OpRun):
    def _run(self, a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any]]:
        if b.ndim == 2:
            with np.errstate(over="ignore"):
                a = a.astype(np.float16).astype(np.float32)
        with np.errstate(invalid="ignore"):
            return (a @ b,)


def on_cuda(model: ir.Model, feeds: Feeds) -> NDArray[Any]:
    proto = ir.serde.serialize_model(model)
    return _first(ReferenceEvaluator(proto, new_ops=[Abs, Neg, MatMul]), feeds)


def as_written(model: ir.Model, feeds: Feeds) -> NDArray[Any]:
    return _first(ReferenceEvaluator(ir.serde.serialize_model(model)), feeds)


def _first(evaluator: ReferenceEvaluator, feeds: Feeds) -> NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        result: NDArray[Any] = evaluator.run(None, feeds)[0]
    return result


def with_published_masks(model: ir.Model, window: int = 4096) -> int:
    """Give every second layer, from the first on, the mask that transformers builds: int32 positions, |q − k| ≤ window.

    The window is wider than any prompt, so the model computes what it did.
    """
    graph = model.graph
    sums = [
        n for n in graph if n.op_type == "Add" and any(i is not None and i.name == bias_name(model) for i in n.inputs)
    ]
    length = next(i for i in graph.inputs if i.name == "attention_mask").shape[1]  # type: ignore[index]
    constants = {
        "published.rows": np.arange(length, dtype=np.int32)[:, None],
        "published.columns": np.arange(length, dtype=np.int32)[None],
        "published.window": np.int32(window),
        "published.zero": np.float32(0),
        "published.low": np.float32(-1e4),
    }
    values = {}
    for name, array in constants.items():
        tensor = ir.tensor(np.asarray(array), name=name)
        values[name] = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(values[name])
    distance = ir.node("Sub", [values["published.rows"], values["published.columns"]])
    size = ir.node("Abs", [distance.outputs[0]])
    near = ir.node("LessOrEqual", [size.outputs[0], values["published.window"]])
    mask = ir.node("Where", [near.outputs[0], values["published.zero"], values["published.low"]])
    graph.insert_before(next(iter(graph)), [distance, size, near, mask])
    for number, node in enumerate(sums[0::2]):
        masked = ir.node("Add", [node.outputs[0], mask.outputs[0]], name=f"published.masked_{number}")
        node.outputs[0].replace_all_uses_with(masked.outputs[0])
        graph.insert_after(node, masked)
        masked.replace_input_with(0, node.outputs[0])
    for number, node in enumerate(n for n in graph if n.name is None):
        node.name = f"published.{number}"
    return len(sums[0::2])


def bias_name(model: ir.Model) -> str:
    """Return the name of the additive mask: what every Softmax's input adds to the logits."""
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    add = softmax.inputs[0].producer()  # type: ignore[union-attr]
    assert add is not None
    return next(i.name for i in add.inputs if i is not None and sum(1 for _ in i.uses()) > 1)  # type: ignore[return-value]


def checked(model: ir.Model) -> ir.Model:
    onnx.checker.check_model(ir.serde.serialize_model(model))
    return model
