"""A scheduler and its workers as an administrator starts them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESS = f"tcp://127.0.0.1:{30000 + os.getpid() % 20000}"
"""The same for schedulers that follow one another, another one in each process of the tests."""


@contextmanager
def cluster(*worker: str, workers: int = 1) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start a scheduler and workers; yields the scheduler and then the workers."""
    programs: list[tuple[str, ...]] = [("dask_scheduler", "--host", ADDRESS)]
    programs += [("dask_worker", ADDRESS, "--no-nanny", "--nthreads", "1", *worker)] * workers
    started = [
        subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{program}", "--no-dashboard", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for program, *words in programs
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
