"""Run probes on a backend and judge what comes: the only place that decides between works and wrong."""

import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.check.metrics import MAX_DB, compare
from sa3_convert.errors import BackendError, ConversionError, ModelFileError
from sa3_convert.lab.doctor.graphs import Arrays, avoided, converted, reference
from sa3_convert.lab.doctor.probe import GraphProbe, Probe, Setting, ToolProbe
from sa3_convert.lab.doctor.probes import PROBES
from sa3_convert.lab.doctor.results import Answer, Diagnosis, ProbeResult, this_machine
from sa3_convert.mnn.compatibility import Backend, mnn_version, require_backend, runtime_backends
from sa3_convert.mnn.isolated import run_jobs
from sa3_convert.mnn.worker import Job, JobOutcome
from sa3_convert.system.files import partial_folder
from sa3_convert.system.gpu_drivers import cuda_device
from sa3_convert.system.machine import gpus, machine

_FELL_BACK = ("support type", "back to cpu", "fallback to cpu", "fall back")
"""How MNN's backends say on standard output that an operator runs on the CPU."""
CONVERTER = "converter"
"""How the one answer is named that no setting of the runtime changes."""

Progress = Callable[[int, int], None]


def examine(
    backend: Backend, probes: Sequence[Probe] = PROBES, report: Progress = lambda done, total: None
) -> list[ProbeResult]:
    """Run probes on a backend; `report` is called with how many are done, and of how many."""
    require_backend(backend)
    hazards = avoided()
    with partial_folder(Path(tempfile.gettempdir()) / "sa3-doctor") as root:
        prepared = []
        for number, probe in enumerate(probes):
            report(number, len(probes))
            prepared.append(_prepared(probe, root / str(number), backend))
        answers = _run(prepared, root, backend)
        report(len(probes), len(probes))
    return [
        ProbeResult(
            probe=probe.id,
            asks=probe.asks,
            answers=found,
            hazard=probe.hazard,
            avoided=hazards.get(probe.hazard or "", ""),
            needed_by=probe.needed_by if isinstance(probe, GraphProbe) else (),
            ahead=isinstance(probe, GraphProbe) and probe.ahead,
        )
        for probe, found in zip(probes, answers, strict=True)
    ]


@dataclass(frozen=True)
class _Prepared:
    probe: Probe
    answer: Answer | None
    """Where there is nothing to run."""
    jobs: tuple[Job, ...] = ()


def _prepared(probe: Probe, folder: Path, backend: Backend) -> _Prepared:
    folder.mkdir()
    if isinstance(probe, ToolProbe):
        return _Prepared(probe, _checked(probe, folder))
    try:
        model = converted(probe, folder, probe.flags)
    except ConversionError as error:
        return _Prepared(probe, Answer("unsupported", detail=_first_line(error)))
    feeds = []
    for number, arrays in enumerate(probe.feeds):
        feeds.append(str(folder / f"feeds-{number}.npz"))
        np.savez(feeds[-1], **arrays)  # type: ignore[arg-type]
    outputs = tuple(reference(probe)[0])
    return _Prepared(
        probe,
        None,
        tuple(
            Job(str(model), tuple(feeds), outputs, backend, s.precision, s.memory, str(folder / f"{number}.json"))
            for number, s in enumerate(probe.settings)
        ),
    )


def _checked(probe: ToolProbe, folder: Path) -> Answer:
    try:
        wrong = probe.check(folder)
    except (ConversionError, ModelFileError) as error:
        return Answer("fails", detail=_first_line(error))
    return Answer("works") if wrong is None else Answer("wrong", detail=wrong)


def _run(prepared: Sequence[_Prepared], root: Path, backend: Backend) -> list[dict[str, Answer]]:
    # Memory low last: it is what is known to end in faults.
    jobs = sorted((job for entry in prepared for job in entry.jobs), key=lambda job: job.memory == "low")
    ran = dict(zip(jobs, run_jobs(jobs, root, apart=backend != "cpu"), strict=True))
    return [
        {CONVERTER: entry.answer}
        if entry.answer is not None
        else _answers(entry, [ran[job] for job in entry.jobs], root, backend)
        for entry in prepared
    ]


def _answers(entry: _Prepared, ran: Sequence[JobOutcome], root: Path, backend: Backend) -> dict[str, Answer]:
    probe = entry.probe
    assert isinstance(probe, GraphProbe)
    expected = reference(probe)
    found = {}
    for setting, job, first in zip(probe.settings, entry.jobs, ran, strict=True):
        answer = judged(probe, setting, backend, expected, job, first)
        for _ in range(probe.processes - 1):
            if answer.outcome != "works":
                break
            answer = judged(probe, setting, backend, expected, job, run_jobs([job], root)[0])
        found[setting.name] = answer
    return found


def judged(
    probe: GraphProbe, setting: Setting, backend: Backend, expected: Sequence[Arrays], job: Job, ran: JobOutcome
) -> Answer:
    """Compare what a job left with the reference."""
    if ran.error is not None:
        return Answer("fails", detail=_first_line(ran.error))
    with np.load(job.arrays, allow_pickle=False) as archive:
        results = {name: archive[name] for name in archive.files}
    least = _least_db(probe, setting, backend)
    worst, where = min(
        _compared(array, results[f"{run}/{name}"], _name(expected, name, run))
        for run, outputs in enumerate(expected)
        for name, array in outputs.items()
    )
    if worst < least:
        return Answer("wrong", None if worst == -MAX_DB else worst, where)
    fallen = next((line for line in ran.messages if any(mark in line.lower() for mark in _FELL_BACK)), None)
    return Answer("works", worst) if fallen is None or backend == "cpu" else Answer("cpu", worst, fallen)


def _least_db(probe: GraphProbe, setting: Setting, backend: Backend) -> float:
    """Return what is asked of the arithmetic that a setting asks for: GPUs may use halves at precision normal too."""
    halves = setting.precision == "low" or (setting.precision == "normal" and backend != "cpu")
    return min(probe.least_db, probe.half_db) if halves else probe.least_db


def _compared(reference: NDArray[Any], target: NDArray[Any], what: str) -> tuple[float, str]:
    """Return the ratio in dB and what to say about it; numbers that are not finite must stand in the same places."""
    # MNN pads shapes with ones.
    if [s for s in reference.shape if s != 1] != [s for s in target.shape if s != 1]:
        return -MAX_DB, f"{what}shape {list(target.shape)}, not {list(reference.shape)}"
    target = target.reshape(reference.shape)
    if reference.dtype.kind != "f":
        reference, target = reference.astype(np.float32), target.astype(np.float32)
    finite, there = np.isfinite(reference), np.isfinite(target)
    if np.any(there & ~finite):
        return -MAX_DB, f"{what}a number where NaN belongs"
    if np.any(finite & ~there):
        return -MAX_DB, f"{what}NaN or infinity"
    return compare(reference[finite], target[finite]).signal_to_noise_db, what.removesuffix(": ")


def _name(expected: Sequence[Arrays], output: str, run: int) -> str:
    """Return which output of which run, if there are several, and a colon."""
    parts = [output] if len(expected[0]) > 1 else []
    parts += [f"run {run + 1}"] if len(expected) > 1 else []
    return f"{', '.join(parts)}: " if parts else ""


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0][:200]


def diagnose(backend: Backend, report: Progress = lambda done, total: None) -> Diagnosis:
    """Run every probe on a backend."""
    start = time.perf_counter()
    results = tuple(examine(backend, report=report))
    return Diagnosis(
        mnn=mnn_version(),
        backend=backend,
        machine=this_machine(),
        results=results,
        seconds=time.perf_counter() - start,
        surroundings=surroundings(),
    )


def surroundings() -> dict[str, Any]:
    """Return what is there, JSON-ready; None stands for what torch or ONNX Runtime has where it is not installed."""
    found = machine()
    found["gpus"] = [{"name": gpu.name, "driver": gpu.driver, "memory_bytes": gpu.memory_bytes} for gpu in gpus()]
    return found | {
        "cuda_driver": _cuda_driver(),
        "mnn_backends": runtime_backends(),
        "onnxruntime_providers": _onnxruntime_providers(),
        "torch_cuda": _torch_cuda(),
    }


def _cuda_driver() -> str:
    """Return what NVIDIA's driver says of its first device, or why it does not."""
    try:
        return str(cuda_device())
    except BackendError as error:
        return str(error)


def _onnxruntime_providers() -> list[str] | None:
    try:
        return list(importlib.import_module("onnxruntime").get_available_providers())
    except ImportError:
        return None


def _torch_cuda() -> dict[str, Any] | None:
    """Return torch's CUDA version (None for a CPU build) and whether it finds a device."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    return {"version": torch.version.cuda, "available": bool(torch.cuda.is_available())}
