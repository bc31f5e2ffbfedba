"""Runs of models in processes of their own, which a model may end."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sa3_convert.errors import ConversionError
from sa3_convert.mnn.isolated import WORKER, run_worker
from sa3_convert.mnn.worker import Job, JobOutcome

JOB_SECONDS = 60.0
# Fresh memory holds this pattern instead of what happens to lie there (glibc): what reads out of bounds is found every
# time.
_PATTERN = ("env", "MALLOC_PERTURB_=165")


def run_jobs(jobs: Sequence[Job], folder: Path, *, timeout: float = JOB_SECONDS) -> list[JobOutcome]:
    """Run jobs in one process after the other: where one ends the process, the next goes on behind it."""
    found: list[JobOutcome] = []
    while len(found) < len(jobs):
        waiting = jobs[len(found) :]
        listed = folder / "jobs.json"
        listed.write_text(json.dumps([asdict(job) for job in waiting]), encoding="utf-8")
        try:
            start(["run", str(listed)], folder, timeout)
            ended = "The process ended without a word."
        except ConversionError as error:
            ended = str(error)
        done = [_outcome(job) for job in waiting]
        found += [outcome for outcome in done if outcome is not None]
        if None in done:
            found.append(JobOutcome(ended, ()))
    return found[: len(jobs)]


def _outcome(job: Job) -> JobOutcome | None:
    try:
        data = json.loads(Path(job.report).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return JobOutcome(data["error"], tuple(data["messages"]))


def start(arguments: Sequence[str], folder: Path, timeout: float = JOB_SECONDS, command: Sequence[str] = WORKER) -> str:
    """Run a worker whose fresh memory is filled with a pattern; return what it printed."""
    pattern = _PATTERN if os.name == "posix" and shutil.which("env") else ()
    return run_worker(arguments, folder, timeout=timeout, command=(*pattern, *command))
