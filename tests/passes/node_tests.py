"""ONNX's own node tests in three forms, as folders that `node_worker` judges.

- given: as ONNX has it, every input an input.
- constant: all inputs but the first are constants, as weights, axes and shapes are in exported graphs.
- dynamic: the same, and all dimensions of the first input but the batch are dynamic.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

ROOT = Path(__file__).parents[2]
FORMS = ("given", "constant", "dynamic")


def write_cases(folder: Path, operators: Iterable[str] | None = None) -> list[Path]:
    """Write every node test, or those of ONNX's modules that are named, in all forms that it has."""
    from onnx.backend.test.case.node import _NodeTestCases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if operators is None:
            from onnx.backend.test.loader import load_model_tests

            cases = load_model_tests(kind="node")
        else:
            for operator in operators:
                import_module(f"onnx.backend.test.case.node.{operator}")
            cases = list(_NodeTestCases)
    found = []
    for case in cases:
        for form in FORMS:
            model = _in_form(case.model, case.data_sets[0][0], form)
            if model is not None:
                found.append(_write(folder / f"{case.name}.{form}", model, *case.data_sets[0]))
    return found


def judged(folders: Sequence[Path], *, lint: bool = True) -> dict[str, tuple[str, str]]:
    """Return the verdict on each test and what there is to say: `lint` `reader` `converter` `session` refused it,
    `died` `wrong` `right` is what MNN did with it, and `bug` would be an exception of ours."""
    listed = folders[0].parent / "folders.txt"
    listed.write_text("\n".join(str(folder) for folder in folders))
    # Fresh memory holds a pattern, so that what reads out of bounds is found.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "tests.passes.node_worker", str(listed), *([] if lint else ["--without-lint"])]
    subprocess.run(program, cwd=folders[0].parent, env=environment, capture_output=True, check=True)
    found = {}
    for folder in folders:
        report = folder / "result.json"
        verdict, why = json.loads(report.read_text()) if report.exists() else ("bug", "")
        found[folder.name] = (verdict, why)
    return found


def _in_form(given: onnx.ModelProto, inputs: Sequence[Any], form: str) -> onnx.ModelProto | None:
    if form == "given":
        return given
    graph = given.graph
    tensors = [_tensor(value) for value in inputs]
    if len(graph.input) != len(inputs) or any(tensor is None for tensor in tensors) or not inputs:
        return None
    first = graph.input[0].type.tensor_type
    if len(graph.input) < 2 if form == "constant" else len(first.shape.dim) < 2:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(given)
    graph = model.graph
    for value, tensor in list(zip(graph.input, tensors, strict=True))[1:]:
        assert tensor is not None
        tensor.name = value.name
        graph.initializer.append(tensor)
    del graph.input[1:]
    if form == "dynamic":
        for index, size in enumerate(graph.input[0].type.tensor_type.shape.dim):
            if index:
                size.dim_param = f"N{index}"
        for output in graph.output:
            for index, size in enumerate(output.type.tensor_type.shape.dim):
                size.dim_param = f"{output.name}_{index}"
    return model


def _tensor(value: Any) -> onnx.TensorProto | None:
    if isinstance(value, onnx.TensorProto):
        copy = onnx.TensorProto()
        copy.CopyFrom(value)
        return copy
    array = np.asarray(value) if isinstance(value, np.ndarray | np.generic) else None
    return None if array is None or array.dtype == object else numpy_helper.from_array(array)


def _write(folder: Path, model: onnx.ModelProto, inputs: Sequence[Any], outputs: Sequence[Any]) -> Path:
    folder.mkdir()
    onnx.save(model, folder / "test.onnx")
    names = [value.name for value in model.graph.output]
    np.savez(folder / "feeds.npz", **_arrays([value.name for value in model.graph.input], inputs))
    np.savez(folder / "expected.npz", **_arrays(names, outputs))
    (folder / "outputs.json").write_text(json.dumps(names))
    return folder


def _arrays(names: Sequence[str], values: Sequence[Any]) -> dict[str, NDArray[Any]]:
    """Return the tensors by name, types that NumPy does not know as float32; what is no tensor stays out."""
    found = {}
    for name, value in zip(names, values, strict=False):
        tensor = _tensor(value)
        if tensor is not None and tensor.data_type != onnx.TensorProto.STRING:
            array = numpy_helper.to_array(tensor)
            found[f"_{name}"] = array if array.dtype.kind in "fiub" else array.astype(np.float32)
    return found
