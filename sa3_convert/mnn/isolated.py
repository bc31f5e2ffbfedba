"""Worker processes that share nothing with this one: MNN's converter, and runs of models that may end them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sa3_convert import WAITING
from sa3_convert.errors import ConversionError
from sa3_convert.mnn.worker import FULL_DISK, Job, JobOutcome, has_room
from sa3_convert.system.log import note
from sa3_convert.system.supervisor import KILLED

# -P: the working directory is not searched for modules.
WORKER: tuple[str, ...] = (sys.executable, "-P", "-s", "-m", "sa3_convert.mnn.worker")

TIMEOUT_SECONDS = 3600.0
"""Far above what the largest published model takes (minutes); a converter that hangs is ended."""

_KEPT_VARIABLES = (
    "PATH",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "TMPDIR",
    "TEMP",
    "TMP",
    "SYSTEMROOT",
    "MALLOC_ARENA_MAX",
    *WAITING,
)
"""Without the system's root no program starts on Windows."""
_ONE_HEAP = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"
"""MNN's converter copies all weights again and again. Where glibc gave memory back each time, and had it in small
pages, it spent two thirds of its time in the kernel, which filled pages with zeros. Other C libraries do not read
this."""
_LAST_LINES = 12
_OUTPUT_LOST = 120
"""How Python ends when the last of its output could not be written."""


def run_worker(
    arguments: Sequence[str], folder: Path, *, timeout: float = TIMEOUT_SECONDS, command: Sequence[str] = WORKER
) -> str:
    """Run the worker with `folder` as its working directory and return what it printed, errors included.

    A normal end says only that the process was not killed: the caller judges what it made.

    Args:
        arguments: the worker's command and its arguments; paths must be absolute.
        folder: a folder of this process's own. MNN's converter passes all weights through a file of a fixed name in
            its working directory, and two that share one exchange weights without an error.
        timeout: seconds until it is killed.
        command: what to start.

    Raises:
        ConversionError: it was killed by a signal, ran too long, failed, or could not be started; with its last lines.

    """
    log = folder / "output.txt"
    converts = arguments[:1] == ["convert"]
    what = f"MNN's {'converter' if converts else 'loader'}"
    with log.open("wb") as stream:
        try:
            status = subprocess.run(
                [*command, *arguments],
                cwd=folder,
                env=_environment(folder) | ({"GLIBC_TUNABLES": _ONE_HEAP} if converts else {}),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise ConversionError(
                f"{what} did not end within {timeout:g} seconds and was stopped.{last_lines(log)}"
            ) from None
        except OSError as error:
            raise ConversionError(f"{what} could not be started: {error}.") from None
        finally:
            note(what, _read(log).splitlines())
    if status < 0:
        raise ConversionError(
            f"{what} was killed by {_signal_name(-status)}. "
            + ("Most likely memory ran out. " if -status == KILLED else "")
            + f"Nothing was written.{last_lines(log)}"
        )
    if status != 0:
        if status in (FULL_DISK, _OUTPUT_LOST) or not has_room(folder):
            raise ConversionError(f"The disk is full, so what {what} wrote cannot be trusted.{last_lines(log)}")
        raise ConversionError(f"{what} failed with exit status {status}.{last_lines(log)}")
    return _read(log)


def last_lines(log: Path | str) -> str:
    """Return the end of a worker's output, from its file or as text, as the end of a message."""
    text = _read(log) if isinstance(log, Path) else log
    lines = [line.rstrip() for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    return "\nIts last lines:\n" + "\n".join(f"  {line}" for line in lines) if lines else "\nIt printed nothing."


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _environment(folder: Path) -> dict[str, str]:
    """Return what the worker sees: where modules are found, and nothing of the user's settings, proxies or tokens."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    paths = [str(Path(entry or ".").absolute()) for entry in sys.path]
    return kept | {
        "HOME": str(folder),
        "LC_ALL": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


JOB_SECONDS = 60.0
# Fresh memory holds this pattern instead of what happens to lie there (glibc): what reads out of bounds is found every
# time.
_PATTERN = ("env", "MALLOC_PERTURB_=165")


def run_jobs(
    jobs: Sequence[Job], folder: Path, *, apart: bool = False, timeout: float = JOB_SECONDS
) -> list[JobOutcome]:
    """Run jobs in one process after the other: where one ends the process, the next goes on behind it.

    `apart` gives each job a process of its own: after a fault of a GPU everything else in its process fails, too.
    """
    found: list[JobOutcome] = []
    while len(found) < len(jobs):
        waiting = jobs[len(found) :][: 1 if apart else None]
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
