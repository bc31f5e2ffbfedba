"""Judge node tests, what MNN does in forks of this process, which it may end: reader, lint, converter, session.

Started by `node_tests` with a list of folders that it wrote. The process is warm, so a test costs no imports.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from sa3_convert.errors import ConversionError, ModelFileError
from sa3_convert.mnn import converter as convert
from sa3_convert.mnn import worker
from sa3_convert.mnn.compatibility import load_mnn
from sa3_convert.mnn.onnx_input import Ports, read_onnx_input
from sa3_convert.mnn.session import MnnSession
from sa3_convert.passes.hazards import refuse_hazards
from sa3_convert.recipe import ComponentRecipe

SECONDS = 30
LEAST_DB = 60.0
"""Single operators reach 100 dB and more; a test of float16 has half's rounding, which MNN does not do (66 dB)."""


class DiedError(Exception):
    """A process ended by a signal."""


class Forked(convert.Converter):
    """The converter in a fork of this process."""

    def run(self, flags: Sequence[str], folder: Path) -> str:
        _forked(partial(_convert, ["mnnconvert", *flags, *convert._COMMON_FLAGS], folder))
        return (folder / "output.txt").read_text(errors="replace")

    def ports(self, model: Path, folder: Path) -> Ports:
        report = folder / "ports.json"
        _forked(partial(worker._ports, model, report))
        found = json.loads(report.read_text())
        if "error" in found:
            raise ConversionError(found["error"])
        inputs = {name: (dtype, tuple(shape)) for name, (dtype, shape) in found["inputs"].items()}
        return Ports(inputs, frozenset(found["outputs"]))


def _convert(arguments: list[str], folder: Path) -> None:
    import _tools

    os.chdir(folder)
    with Path("output.txt").open("wb") as stream:
        os.dup2(stream.fileno(), 1)
    _tools.mnnconvert(arguments)


def judge(folder: Path, *, lint: bool) -> None:
    """Write the verdict on one test."""
    verdict, why = _verdict(folder, lint=lint)
    (folder / "result.json").write_text(json.dumps([verdict, " ".join(str(why).split())[:200]]))


def _verdict(folder: Path, *, lint: bool) -> tuple[str, object]:
    source, made = folder / "test.onnx", folder / "test.mnn"
    try:
        read_onnx_input(source)
        model = ir.load(source)
    except (ConversionError, ValueError, DecodeError) as error:
        return "reader", error
    try:
        if lint:
            refuse_hazards(model, target_mnn="3.6")
    except ConversionError as error:
        return "lint", error
    try:
        convert.mnn_from_onnx(source, made, ComponentRecipe(floor_db=1), converter=Forked())
    except ConversionError as error:
        return "converter", error
    except DiedError as error:
        return "died", error
    try:
        _forked(partial(_run, made, folder))
    except DiedError as error:
        return "died", error
    refusal = folder / "refusal.txt"
    if refusal.exists():
        return "session", refusal.read_text()
    expected, actual = np.load(folder / "expected.npz"), np.load(folder / "actual.npz")
    problems = [f"{name}: {found}" for name in expected.files if (found := difference(expected[name], actual[name]))]
    return ("wrong", problems[0]) if problems else ("right", "")


def _run(model: Path, folder: Path) -> None:
    with np.load(folder / "feeds.npz") as file:
        feeds = {name.removeprefix("_"): file[name] for name in file.files}
    outputs = json.loads((folder / "outputs.json").read_text())
    try:
        with MnnSession(model, outputs=outputs, threads=1) as session:
            results = session.run({name: feeds[name].astype(port.dtype) for name, port in session.inputs.items()})
    except (ModelFileError, ValueError) as error:
        (folder / "refusal.txt").write_text(str(error))
        return
    np.savez(folder / "actual.npz", **{f"_{name}": array for name, array in results.items()})  # type: ignore[arg-type]


def difference(expected: NDArray[Any], actual: NDArray[Any]) -> str | None:
    """Return what differs: integers must be equal, floats within `LEAST_DB`, NaN and infinities in their places."""
    if expected.shape != actual.shape:
        return f"shape {actual.shape} instead of {expected.shape}"
    reference, target = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(reference)
    if not np.array_equal(reference[~finite], target[~finite], equal_nan=True) or not np.isfinite(target[finite]).all():
        return "other values are infinite or no numbers"
    error = float(((reference - target)[finite] ** 2).sum())
    if not error:
        return None
    if expected.dtype.kind in "iub":
        return f"{np.count_nonzero(reference != target)} of {reference.size} integers differ"
    with np.errstate(divide="ignore"):
        ratio = 10 * np.log10(float((reference[finite] ** 2).sum()) / error)
    return None if ratio >= LEAST_DB else f"{ratio:.1f} dB"


def _forked(work: Callable[[], object]) -> None:
    """Do it in a fork; whatever it raises is printed there.

    Raises:
        DiedError: by a signal, that of a time limit included.
        RuntimeError: by an exception.

    """
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(SECONDS)
            work()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        raise DiedError(signal.Signals(-status).name)
    if status:
        raise RuntimeError(f"{work} failed")


def main(arguments: list[str]) -> int:
    """Judge the folders that a file lists; a verdict that is missing afterwards is a bug of ours."""
    for line in Path(arguments[0]).read_text().splitlines():
        try:
            judge(Path(line), lint="--without-lint" not in arguments)
        except Exception:
            traceback.print_exc()
    return 0


if __name__ == "__main__":
    import _tools  # noqa: F401

    load_mnn()
    sys.exit(main(sys.argv[1:]))
