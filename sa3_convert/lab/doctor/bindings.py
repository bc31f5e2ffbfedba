"""What MNN's Python bindings do with what they are asked: checks, each in a process of its own.

Each gets a model with 8-bit weights, its graph `probe.onnx` beside it, and returns what is wrong, or None.
"""

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.mnn.compatibility import BACKENDS, FORWARD_TYPES, has_backend, load_mnn
from sa3_convert.mnn.isolated import start
from sa3_convert.mnn.worker import SCRATCH
from sa3_convert.system.log import capture_stdout
from sa3_convert.system.supervisor import die_with_parent

_INFO_BACKEND = 2
_PROGRAM = (sys.executable, "-P", "-s", "-m", "sa3_convert.lab.doctor.bindings")


def check_apart(name: str, model: Path, folder: Path) -> str | None:
    """Run a check in a process of its own, which MNN may end."""
    report = folder / f"{name}.json"
    start([name, str(model), str(report)], folder, command=_PROGRAM)
    found = json.loads(report.read_text(encoding="utf-8"))
    return None if found is None else str(found)


def scratch(model: Path) -> str | None:
    """Whether the converter passes weights through a file of a fixed name in its working directory."""
    tools = importlib.import_module("_tools")
    mark = b"somebody else's weights"
    Path(SCRATCH).write_bytes(mark)
    source, target = model.with_name("probe.onnx"), model.with_name("again.mnn")
    with capture_stdout():
        tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target)])
    touched = not Path(SCRATCH).exists() or Path(SCRATCH).read_bytes() != mark
    return f"it overwrote {SCRATCH}" if touched else None


def words(model: Path) -> str | None:
    """Whether settings given as words count."""
    normal, word, number = (_output(model, {"memory": memory}) for memory in (0, "low", 2))
    if np.array_equal(normal, number):
        return None
    return '"low" computes as normal does' if np.array_equal(word, normal) else None


def replaced(model: Path) -> str | None:
    """Whether a backend that is not there is an error."""
    absent = next((backend for backend in BACKENDS if not has_backend(backend)), None)
    if absent is None:
        return None
    with capture_stdout():
        interpreter = load_mnn().Interpreter(str(model))
        session = interpreter.createSession({"backend": absent.upper()})
        used = FORWARD_TYPES.get(int(interpreter.getSessionInfo(session, _INFO_BACKEND)), "something else")
    return None if used == absent else f"asked for {absent}, runs on {used}"


CHECKS: Mapping[str, Callable[[Path], str | None]] = {"scratch": scratch, "words": words, "replaced": replaced}


def _output(model: Path, settings: Mapping[str, Any]) -> NDArray[Any]:
    mnn = load_mnn()
    x = np.linspace(-1, 1, 48, dtype=np.float32)[None]
    with capture_stdout():
        interpreter = mnn.Interpreter(str(model))
        session = interpreter.createSession({"backend": "CPU", "numThread": 1} | dict(settings))
        tensor = interpreter.getSessionInput(session, "x")
        host = mnn.Tensor(x.shape, mnn.Halide_Type_Float, x, mnn.Tensor_DimensionType_Caffe)
        tensor.copyFrom(host)
        interpreter.runSession(session)
        output = interpreter.getSessionOutput(session, "y")
        result = np.zeros(tuple(output.getShape()), np.float32)
        filled = mnn.Tensor(result.shape, mnn.Halide_Type_Float, result, mnn.Tensor_DimensionType_Caffe)
        output.copyToHostTensor(filled)
        return np.array(filled.getNumpyData())


def _main(name: str, model: str, report: str) -> None:
    die_with_parent()
    Path(report).write_text(json.dumps(CHECKS[name](Path(model))), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
