"""A small network of the kinds of operators that the real ones have, and ways to break it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sa3_convert.arrays import Arrays

WIDTH = 32
Weights = dict[str, NDArray[Any]]


def weights() -> Weights:
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> NDArray[np.float32]:
        return (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    kernel = random.standard_normal((WIDTH, WIDTH, 3)).astype(np.float32)
    return {
        "frequencies": (2 * np.pi * np.logspace(np.log10(0.5), 4, WIDTH // 2)).astype(np.float32),
        "time.weight": matrix(WIDTH, WIDTH),
        "in.weight": matrix(WIDTH, WIDTH),
        "in.bias": random.standard_normal(WIDTH).astype(np.float32),
        "scale": np.array(0.25, np.float32),
        "norm.eps": np.array(1e-6, np.float32),
        "norm.gamma": random.uniform(0.5, 1.5, WIDTH).astype(np.float32),
        "q.weight": matrix(WIDTH, WIDTH),
        "k.weight": matrix(WIDTH, WIDTH),
        "gate.weight": matrix(WIDTH, 2 * WIDTH),
        "up.weight": matrix(WIDTH, 2 * WIDTH),
        "down.weight": matrix(2 * WIDTH, WIDTH),
        "conv.v": kernel,
        "conv.g": random.uniform(0.5, 1.5, (WIDTH, 1, 1)).astype(np.float32),
        "conv.bias": random.standard_normal(WIDTH).astype(np.float32),
    }


class Net:
    """Nodes in order, each with one output of the node's own name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, operator: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name


def network(net: Net) -> str:
    """`x` [1,T,WIDTH], `t` [1,1] → [1,WIDTH,T]."""
    net("Mul", "phase", "t", "frequencies")
    net("Concat", "features", net("Cos", "cos", "phase"), net("Sin", "sin", "phase"), axis=-1)
    net("MatMul", "time", "features", "time.weight")
    net("Add", "in", net("MatMul", "in.product", "x", "in.weight"), "in.bias")
    net("Mul", "scaled", "in", "scale")
    net("Add", "timed", "scaled", "time")
    mean = net("ReduceMean", "norm.mean", net("Mul", "norm.square", "timed", "timed"), "last", keepdims=1)
    root = net("Sqrt", "norm.root", net("Add", "norm.stable", mean, "norm.eps"))
    net("Mul", "norm", net("Div", "norm.unit", "timed", root), "norm.gamma")
    net("MatMul", "q", "norm", "q.weight")
    net("MatMul", "k", "norm", "k.weight")
    net("MatMul", "logits", "q", net("Transpose", "k.t", "k", perm=[0, 2, 1]))
    net("MatMul", "attended", net("Softmax", "attention", "logits", axis=-1), "norm")
    net("MatMul", "gate", "attended", "gate.weight")
    net("Mul", "gate.silu", "gate", net("Sigmoid", "gate.sigmoid", "gate"))
    net("MatMul", "up", "attended", "up.weight")
    net("Mul", "gated", "gate.silu", "up")
    net("MatMul", "down", "gated", "down.weight")
    net("Add", "residual", "timed", "down")
    net("Transpose", "channels", "residual", perm=[0, 2, 1])
    # Weight norm as it should be spelled for MNN: no ReduceL2.
    square = net("ReduceSum", "conv.sum", net("Mul", "conv.square", "conv.v", "conv.v"), "in_kernel", keepdims=1)
    net("Mul", "conv.weight", "conv.v", net("Div", "conv.ratio", "conv.g", net("Sqrt", "conv.norm", square)))
    return net("Conv", "conv", "channels", "conv.weight", "conv.bias", pads=[1, 1])


_INDICES = {"last": np.array([-1], np.int64), "in_kernel": np.array([1, 2], np.int64)}


_SHAPES: Mapping[str, list[int | str]] = {"x": [1, "T", WIDTH], "t": [1, 1]}


def write(
    path: Path,
    build: Callable[[Net], str],
    constants: Mapping[str, NDArray[Any]],
    inputs: tuple[str, ...] = ("x", "t"),
) -> Path:
    """Write a network whose result is named `y`."""
    net = Net()
    net("Tanh", "y", build(net))
    read = {name for node in net.nodes for name in node.input}
    values = {name: value for name, value in {**_INDICES, **constants}.items() if name in read}
    graph = helper.make_graph(
        net.nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, _SHAPES[name]) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 3)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=256)
    return path


def feeds(length: int = 9) -> Arrays:
    random = np.random.default_rng(length)
    return {
        "x": random.standard_normal((1, length, WIDTH)).astype(np.float32),
        "t": np.array([[0.73]], np.float32),
    }
