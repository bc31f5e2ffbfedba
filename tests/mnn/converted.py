"""Small ONNX graphs and what MNN's converter makes of them with given flags; conversions are made once a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sa3_convert.mnn.isolated import run_worker
from sa3_convert.mnn.session import MnnSession

Floats = NDArray[np.float32]

ROWS, WIDTH, HIDDEN, OUT, CHANNELS = 300, 64, 128, 96, 32
"""Sizes of the mixed graph."""


def gaussian(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save_graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[int]]],
    outputs: list[str],
    constants: dict[str, NDArray[Any]],
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def linear_graph(path: Path, weight: Floats) -> Path:
    """Write y = x·weight, [in, in] → [in, out]."""
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    return save_graph(path, [node], {"x": (TensorProto.FLOAT, [weight.shape[0]] * 2)}, ["y"], {"weight": weight})


def convolution_graph(path: Path, weight: Floats, groups: int = 1) -> Path:
    """Write a 1-D convolution with bias, [1, in, n] → [1, out, n]."""
    kernel = weight.shape[2]
    pads = [kernel // 2, kernel // 2]
    node = helper.make_node("Conv", ["x", "weight", "bias"], ["y"], pads=pads, group=groups)
    constants = {"weight": weight, "bias": gaussian(weight.shape[0], seed=9)}
    return save_graph(path, [node], {"x": (TensorProto.FLOAT, [1, weight.shape[1] * groups, 8])}, ["y"], constants)


def mixed_graph(path: Path, shrink: int = 1) -> Path:
    """Write token lookup → linear with bias → tanh → linear → convolution → product with a 3-D constant → norm."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "w1"], ["product"]),
        helper.make_node("Add", ["product", "b1"], ["first"]),
        helper.make_node("Tanh", ["first"], ["activated"]),
        helper.make_node("MatMul", ["activated", "w2"], ["second"]),
        helper.make_node("Transpose", ["second"], ["channels_first"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["channels_first", "kernel", "b3"], ["conv"], pads=[1, 1]),
        helper.make_node("MatMul", ["conv", "stack"], ["stacked"]),
        helper.make_node("Transpose", ["stacked"], ["channels_last"], perm=[0, 2, 1]),
        helper.make_node("LayerNormalization", ["channels_last", "gamma", "beta"], ["out"]),
    ]
    rows, width, hidden, out, channels = (size // shrink for size in (ROWS, WIDTH, HIDDEN, OUT, CHANNELS))
    constants = {
        "table": gaussian(rows, width, seed=1),
        "w1": gaussian(width, hidden, seed=2),
        "b1": gaussian(hidden, seed=3),
        "w2": gaussian(hidden, out, seed=4),
        "kernel": gaussian(channels, out, 3, seed=5),
        "b3": gaussian(channels, seed=6),
        "stack": gaussian(1, 8, 8, seed=7),
        "gamma": gaussian(channels, seed=8),
        "beta": gaussian(channels, seed=9),
    }
    return save_graph(path, nodes, {"ids": (TensorProto.INT32, [1, 8])}, ["out"], constants)


class Converter:
    """Runs MNN's converter and remembers what it has made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[Path, tuple[str, ...]], Path] = {}

    def __call__(self, source: Path, *flags: str) -> Path:
        """Return `source` converted with the flags; an `.mnn` as source is the second pass."""
        key = (source, flags)
        if key not in self._made:
            folder = self._folder / str(len(self._made))
            folder.mkdir()
            target = folder / f"{source.stem}.mnn"
            framework = "MNN" if source.suffix == ".mnn" else "ONNX"
            files = ["-f", framework, "--modelFile", str(source), "--MNNModel", str(target)]
            run_worker(["convert", *files, "--bizCode", "test", *flags], folder, timeout=60)
            assert target.is_file()
            self._made[key] = target
        return self._made[key]

    def from_json(self, content: dict[str, Any]) -> Path:
        """Return the model that MNN writes for its own JSON form: for operators that no ONNX graph becomes."""
        folder = self._folder / f"json{len(list(self._folder.iterdir()))}"
        folder.mkdir()
        source, target = folder / "model.json", folder / "model.mnn"
        source.write_text(json.dumps(content))
        run_worker(["convert", "-f", "JSON", "--modelFile", str(source), "--MNNModel", str(target)], folder, timeout=60)
        assert target.is_file()
        return target

    def dump(self, model: Path) -> dict[str, Any]:
        """Return MNN's own account of a model."""
        folder = self._folder / f"dump{len(list(self._folder.iterdir()))}"
        folder.mkdir()
        target = folder / "dump.json"
        run_worker(["convert", "-f", "MNN", "--modelFile", str(model), "--JsonFile", str(target)], folder, timeout=60)
        found: dict[str, Any] = json.loads(target.read_text())
        return found


def what_mnn_multiplies_with(model: Path, inputs: int) -> Floats:
    """Return [in, out]: what MNN makes of the identity."""
    with MnnSession(model, threads=1) as session:
        result = session.run({"x": np.eye(inputs, dtype=np.float32)})["y"]
    return np.asarray(result, np.float32)
