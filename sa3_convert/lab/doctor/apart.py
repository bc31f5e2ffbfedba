"""Conversions and runs in processes of their own, as MNN does them by itself: no pass and no judge of ours between."""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sa3_convert.errors import ConversionError
from sa3_convert.lab.doctor.probe import GraphProbe
from sa3_convert.lab.doctor.worker import CALL, RUN, Job, Ran
from sa3_convert.system.isolated import run_worker

TIMEOUT_SECONDS = 60.0

_WORKER = (sys.executable, "-P", "-s", "-m", "sa3_convert.lab.doctor.worker")
# Fresh memory holds this pattern instead of what happens to lie there (glibc): what reads out of bounds is found every
# time.
_PATTERN = ("env", "MALLOC_PERTURB_=165")
_AS_CONVERTED_HERE = {"--optimizeLevel": "1", "--useGeluApproximation": "0"}


def converted(probe: GraphProbe, folder: Path, flags: Sequence[str] = (), *, plain: bool = False) -> Path:
    """Convert a probe's graph into an empty folder and return the file.

    Args:
        probe: gives the graph.
        folder: empty; also the converter's working directory.
        flags: of the converter.
        plain: leave away the flags that every conversion of this project has.

    Raises:
        ConversionError: the converter was ended by a signal, or wrote no file.

    """
    target = folder / "probe.mnn"
    given = [] if plain else [word for f in _AS_CONVERTED_HERE.items() if f[0] not in flags for word in f]
    output = converter_output(probe, target, folder, [*flags, *given])
    if not target.is_file() or not target.stat().st_size:
        raise ConversionError(f"no file: {_complaint(output)}")
    return target


def converter_output(probe: GraphProbe, target: Path, folder: Path, flags: Sequence[str]) -> str:
    """Ask the converter for `target` and return what it said.

    Raises:
        ConversionError: it was ended by a signal.

    """
    source = folder / "probe.onnx"
    probe.write(source)
    arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "sa3", *flags]
    return run_worker(["convert", *arguments], folder, timeout=TIMEOUT_SECONDS)


def call(name: str, model: Path, folder: Path) -> str | None:
    """Run one of `bindings`' checks on a model that `converted` made; return what is wrong, or None.

    Raises:
        ConversionError: the process did not live to its end.

    """
    report = folder / f"{name}.json"
    _start([CALL, name, str(model), str(report)], folder)
    found = json.loads(report.read_text(encoding="utf-8"))
    return None if found is None else str(found)


def run_jobs(jobs: Sequence[Job], folder: Path, *, timeout: float = TIMEOUT_SECONDS) -> list[Ran]:
    """Run jobs in one process after the other: where one ends the process, the next goes on behind it.

    Args:
        jobs: what to run; paths are absolute.
        folder: for the processes; their own.
        timeout: seconds until a process is ended.

    """
    found: list[Ran] = []
    while len(found) < len(jobs):
        waiting = jobs[len(found) :]
        listed = folder / "jobs.json"
        listed.write_text(json.dumps([asdict(job) for job in waiting]), encoding="utf-8")
        try:
            _start([RUN, str(listed)], folder, timeout)
            ended = "The process ended without a word."
        except ConversionError as error:
            ended = str(error)
        done = [_ran(job) for job in waiting]
        found += [ran for ran in done if ran is not None]
        if None in done:
            found.append(Ran(ended, ()))
    return found[: len(jobs)]


def _complaint(output: str) -> str:
    """Return the line in which the converter says why, or its last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "not support" in line.lower() or "error" in line.lower()]
    return re.sub(r"^\[[\d:]+\] \S*: ", "", (telling or lines or ["it printed nothing"])[-1])


def _ran(job: Job) -> Ran | None:
    try:
        data = json.loads(Path(job.report).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Ran(data["error"], tuple(data["messages"]))


def _start(arguments: Sequence[str], folder: Path, timeout: float = TIMEOUT_SECONDS) -> str:
    pattern = _PATTERN if os.name == "posix" and shutil.which("env") else ()
    return run_worker(arguments, folder, timeout=timeout, command=(*pattern, *_WORKER))
