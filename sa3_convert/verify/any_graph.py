"""Any ONNX file against the `.mnn` made of it: ONNX Runtime here, MNN in a process of its own, which it may end."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.components import Component
from sa3_convert.doctor.apart import run_jobs
from sa3_convert.doctor.worker import Job
from sa3_convert.errors import InputError, ModelFileError, VerificationError
from sa3_convert.mnn.isolated import TIMEOUT_SECONDS
from sa3_convert.mnn.onnx_input import read_onnx_input
from sa3_convert.ort import OrtSession
from sa3_convert.passes.pipeline import load_onnx
from sa3_convert.verify.any_inputs import LENGTHS, any_samples, sample_of
from sa3_convert.verify.compare import Outputs
from sa3_convert.verify.inputs import Sample
from sa3_convert.verify.metrics import Sums, sums_of
from sa3_convert.verify.result import ComponentFidelity, Measurement


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
