"""A small graph with all that a component has: a dynamic length, an integer input, an embedding, several outputs."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sa3_convert.ort import OrtSession

WIDTH, ROWS, TOKENS = 64, 100, 5
LAYERS = ("blocks.0.up", "blocks.0.down")


def write_perceptron(path: Path, seed: int = 0, *, activation: str = "Cos") -> Path:
    """Write y = down·sin(up·x) + mean(table[ids]) and z = activation(y); x [1,T,64], ids [1,5]; external weights."""
    random = np.random.default_rng(seed)
    constants = {
        "up": random.standard_normal((WIDTH, 2 * WIDTH)) / np.sqrt(WIDTH),
        "down": random.standard_normal((2 * WIDTH, WIDTH)) / np.sqrt(2 * WIDTH),
        "table": random.standard_normal((ROWS, WIDTH)),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("ReduceMean", ["embedded", "axes"], ["mean"]),
        helper.make_node("MatMul", ["x", "up"], [LAYERS[0]]),
        helper.make_node("Sin", [LAYERS[0]], ["sine"]),
        helper.make_node("MatMul", ["sine", "down"], [LAYERS[1]]),
        helper.make_node("Add", [LAYERS[1], "mean"], ["y"]),
        helper.make_node(activation, ["y"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", WIDTH]),
            helper.make_tensor_value_info("ids", TensorProto.INT32, [1, TOKENS]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "T", WIDTH]) for name in ("y", "z")],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
        + [numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    return path


def feeds(length: int = 7, seed: int = 0) -> dict[str, NDArray[np.float32] | NDArray[np.int32]]:
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((1, length, WIDTH)).astype(np.float32),
        "ids": random.integers(0, ROWS, (1, TOKENS)).astype(np.int32),
    }


def reference(path: Path, length: int = 7, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    return OrtSession(path, threads=1).run(feeds(length, seed))


def decibels(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    error = float(np.square(expected - actual, dtype=np.float64).sum())
    return float(10 * np.log10(np.square(expected, dtype=np.float64).sum() / error)) if error else np.inf
