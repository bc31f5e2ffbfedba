"""Any ONNX file against the `.mnn` made of it, on seeded inputs made from what the graph says of them."""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.check.compare import Outputs
from sa3_convert.check.inputs import Sample
from sa3_convert.check.metrics import Sums, sums_of
from sa3_convert.check.results import ComponentFidelity, Measurement
from sa3_convert.components import Component
from sa3_convert.errors import InputError, ModelFileError, VerificationError
from sa3_convert.mnn.isolated import TIMEOUT_SECONDS, run_jobs
from sa3_convert.mnn.onnx_input import read_onnx_input
from sa3_convert.mnn.worker import Job
from sa3_convert.ort import OrtSession
from sa3_convert.passes import ir_tools
from sa3_convert.passes.pipeline import load_onnx

LENGTHS: Final = (8, 33, 64)
"""Values of every named dimension; a graph may refuse some, such as odd ones."""
SEEDS: Final = 2

_PRODUCT = re.compile(r"(?:(\d+) ?\* ?)?([A-Za-z_]\w*)(?: ?\+ ?(\d+))?")
_VIEWS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_LONGEST_SECONDS = 384.0


def any_samples(model: ir.Model) -> Iterator[Sample]:
    """Yield inputs of several lengths, if the graph has any, and seeds.

    Floats are normal, but for `t`, from 0 to 1, `seconds`, up to the longest duration, and a mask of floats, ones (what
    is computed behind the end of a mask means nothing). Integers that look up rows are rows of their table; others are
    masks: ones, then zeros.
    """
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    dynamic = any(not isinstance(size, int) for value in inputs for size in value.shape or ())
    for length in LENGTHS if dynamic else LENGTHS[:1]:
        for seed in range(SEEDS):
            random = np.random.default_rng([seed, length])
            feeds = {str(value.name): _array(value, length, random) for value in inputs}
            yield Sample(f"seed={seed}" + (f" length={length}" if dynamic else ""), length, feeds)


def sample_of(model: ir.Model, name: str, feeds: Mapping[str, NDArray[Any]]) -> Sample:
    """Return inputs that were given; any but those of the graph are refused."""
    wanted = [str(value.name) for value in model.graph.inputs if value.name not in model.graph.initializers]
    if set(wanted) != set(feeds):
        raise InputError(f"{name} holds {', '.join(feeds) or 'nothing'}; the graph takes {', '.join(wanted)}.")
    return Sample(name, 0, feeds)


def _array(value: ir.Value, length: int, random: np.random.Generator) -> NDArray[Any]:
    if value.dtype is None or value.shape is None:
        raise InputError(f"The graph does not state type and shape of its input {value.name!r}; give --input.")
    shape = tuple(_size(size, length) for size in value.shape)
    kind = value.dtype.numpy()
    if value.dtype == ir.DataType.BOOL or kind.kind in "iu":
        rows = _rows(value)
        if rows is not None:
            return random.integers(0, rows, shape).astype(kind)
        ones = random.integers(1, shape[-1] + 1) if shape else 1
        return np.broadcast_to(np.arange(shape[-1] if shape else 1) < ones, shape or (1,)).reshape(shape).astype(kind)
    if kind.kind != "f":
        raise InputError(f"No numbers can be made up for the input {value.name!r} of type {value.dtype}; give --input.")
    name = value.name or ""
    if name.endswith("mask"):
        return np.ones(shape, kind)
    if name in ("t", "seconds"):
        return (random.uniform(0, 1 if name == "t" else _LONGEST_SECONDS, shape)).astype(kind)
    return random.standard_normal(shape).astype(kind)


def _size(size: int | ir.SymbolicDim, length: int) -> int:
    """Return a dimension when each name in it stands for `length`: 16·length for "16*T"."""
    if isinstance(size, int):
        return size
    parts = _PRODUCT.fullmatch(str(size.value or ""))
    return length if parts is None else int(parts[1] or 1) * length + int(parts[3] or 0)


def _rows(value: ir.Value) -> int | None:
    """Return how many rows the smallest table has that a value looks up in, or None if it looks up in none."""
    found: list[int] = []
    pending, seen = [value], {value}
    while pending:
        for node, index in pending.pop().uses():
            if node.op_type == "Gather" and index == 1:
                table = node.inputs[0]
                axis = ir_tools.attribute_int(node, "axis", 0)
                rows = None if table is None or table.shape is None else table.shape[axis]
                found += [rows] if isinstance(rows, int) else []
            elif node.op_type in _VIEWS and index == 0 and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                pending.append(node.outputs[0])
    return min(found, default=None)


def verify_any(
    reference: Path, target: Path, component: Component, *, given: Mapping[str, NDArray[Any]] | None = None
) -> ComponentFidelity:
    """Compare a `.mnn` with the ONNX file that it was made of, output by output.

    Integers must be equal, floats are measured.

    Args:
        reference: the ONNX.
        target: the `.mnn`.
        component: what figures and messages call it.
        given: inputs by name; None makes them up (see `any_samples`).

    Raises:
        InputError: the inputs are not the graph's, or ONNX Runtime runs it with none that were made up.
        ModelFileError: ONNX Runtime cannot load the file.
        VerificationError: MNN cannot run what it made, or an output is missing, of another shape, not finite, or an
            integer that differs.

    """
    model = load_onnx(reference)
    samples = any_samples(model) if given is None else [sample_of(model, "--input", given)]
    expected = _expected(OrtSession(reference), samples, may_fail=given is None)
    actual = _actual(reference, target, [sample for sample, _ in expected])
    measurements = []
    for (sample, outputs), results in zip(expected, actual, strict=True):
        for name, array in outputs.items():
            sums = _compared(array, results.get(name), f"{name} ({component.value}, {sample.name})")
            measurements.append(Measurement(sample.name, name, sums))
    return ComponentFidelity(component, tuple(measurements))


def _expected(session: OrtSession, samples: Iterable[Sample], *, may_fail: bool) -> list[tuple[Sample, Outputs]]:
    """Return the samples that a graph takes, with what comes out; it may not take every length."""
    found: list[tuple[Sample, Outputs]] = []
    refusal: Exception | None = None
    for sample in samples:
        try:
            found.append((sample, session.run(sample.feeds)))
        except (ModelFileError, ValueError) as error:
            if not may_fail:
                raise InputError(f"{sample.name}: {error}") from None
            refusal = error
    if not found:
        raise InputError(
            f"ONNX Runtime does not run the graph with made-up inputs of length {', '.join(map(str, LENGTHS))}: "
            f"{refusal} Give inputs of yours: --input FILE.npz."
        )
    return found


def _actual(reference: Path, target: Path, samples: list[Sample]) -> list[Outputs]:
    ports = read_onnx_input(reference).ports
    names = tuple(sorted(ports.outputs))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = []
        for number, sample in enumerate(samples):
            files.append(str(folder / f"{number}.npz"))
            np.savez(files[-1], **{n: a.astype(ports.inputs[n][0]) for n, a in sample.feeds.items()})  # type: ignore[arg-type]
        job = Job(str(target.absolute()), tuple(files), names, "cpu", "high", "normal", str(folder / "report.json"))
        (ran,) = run_jobs([job], folder, timeout=TIMEOUT_SECONDS)
        if ran.error is not None:
            raise VerificationError(f"MNN cannot run what was made of {reference.name}: {ran.error}")
        with np.load(job.arrays, allow_pickle=False) as arrays:
            return [{name: arrays[f"{number}/{name}"] for name in names} for number in range(len(samples))]


def _compared(reference: NDArray[Any], target: NDArray[Any] | None, what: str) -> Sums:
    if reference.dtype.kind in "iub":
        if target is None or target.shape != reference.shape or not np.array_equal(reference, target):
            raise VerificationError(
                f"The target's {what} are other integers than the reference's, or of another shape."
            )
        reference = target = reference.astype(np.float32)
    return sums_of(reference.astype(np.float32), target, what=what)
