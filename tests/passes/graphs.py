"""Tiny graphs as text, and their numbers from ONNX Runtime and from MNN."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper, parser

Feeds = Mapping[str, NDArray[Any]]


def graph(text: str, opset: int = 18, **initialisers: NDArray[Any] | np.generic) -> ir.Model:
    """Parse ONNX's textual form; `initialisers` are added by name."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>\n'
    proto = parser.parse_model(header + "tiny " + text)
    for name, array in initialisers.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return ir.serde.deserialize_model(proto)


def checked(model: ir.Model) -> onnx.ModelProto:
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run_ort(model: ir.Model, feeds: Feeds) -> list[NDArray[Any]]:
    """Run as written: optimisations would fold what a pass has changed."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        checked(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(feeds))


def convert(onnx_path: Path, mnn_path: Path, *flags: str) -> None:
    """Run MNN's converter in a process and folder of its own; leaves no file when it fails."""
    program = "import sys, _tools; _tools.mnnconvert(sys.argv)"
    arguments = ["-f", "ONNX", "--modelFile", str(onnx_path), "--MNNModel", str(mnn_path), "--bizCode", "MNN", *flags]
    scratch = mnn_path.parent / f"{mnn_path.name}.scratch"
    scratch.mkdir()
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=scratch, capture_output=True, check=False)


def run_mnn(model: ir.Model, feeds: Feeds, folder: Path, *flags: str) -> list[NDArray[Any]]:
    """Convert and run on MNN's CPU.

    Raises:
        FileNotFoundError: the converter wrote nothing.

    """
    return run_file(mnn_of(model, folder, *flags), feeds, [out.name or "" for out in model.graph.outputs])


def mnn_of(model: ir.Model, folder: Path, *flags: str) -> Path:
    """Convert; raises FileNotFoundError when the converter wrote nothing."""
    number = len(list(folder.iterdir()))
    onnx_path, mnn_path = folder / f"{number}.onnx", folder / f"{number}.mnn"
    onnx.save(checked(model), onnx_path)
    convert(onnx_path, mnn_path, *flags)
    if not mnn_path.exists():
        raise FileNotFoundError(mnn_path)
    return mnn_path


def run_file(mnn_path: Path, feeds: Feeds, outputs: list[str]) -> list[NDArray[Any]]:
    import MNN.expr
    import MNN.nn

    dtypes = {np.dtype("float32"): MNN.expr.float, np.dtype("int32"): MNN.expr.int}
    module = MNN.nn.load_module_from_file(str(mnn_path), list(feeds), outputs)
    variables = [
        MNN.expr.const(np.ascontiguousarray(array), list(array.shape), MNN.expr.NCHW, dtypes[array.dtype])
        for array in feeds.values()
    ]
    results = module.forward(variables)
    plain = [MNN.expr.convert(v, MNN.expr.NCHW) if v.data_format == MNN.expr.NC4HW4 else v for v in results]
    return [np.array(value.read(), copy=True) for value in plain]


def run_file_apart(mnn_path: Path, feeds: Feeds, output: str) -> NDArray[Any]:
    """Run in a process of its own, for what depends on what memory happens to hold."""
    given, result = mnn_path.with_suffix(".npz"), mnn_path.with_suffix(".npy")
    np.savez(given, **feeds)
    program = (
        "import sys, pathlib, numpy; from tests.passes.graphs import run_file;"
        "path, given, output, result = sys.argv[1:];"
        "numpy.save(result, run_file(pathlib.Path(path), dict(numpy.load(given)), [output])[0])"
    )
    arguments = [str(mnn_path), str(given), output, str(result)]
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=root, capture_output=True, check=True)
    array: NDArray[Any] = np.load(result)
    return array


def signal_to_noise_db(reference: NDArray[Any], target: NDArray[Any]) -> float:
    assert reference.shape == target.shape
    error = reference.astype(np.float64) - target.astype(np.float64)
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / np.sum(error**2)))
