"""What the workers of the tests run instead of stages; light, as every worker that dies is followed by one that imports
it.
"""

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path

from sa3_convert.errors import InputError
from sa3_convert.scheduling import Estimate


@dataclass(frozen=True)
class Played:
    name: str
    folder: Path
    needs: tuple[str, ...]
    takes: Estimate


def task(name: str, folder: Path, *needs: str, memory: int = 1) -> Played:
    return Played(name, folder, needs, Estimate(1.0, memory))


def quick(task: Played, *before: int) -> int:
    """Leave a mark of each run in the folder; do as the task's name says, and return how many it was handed."""
    with (task.folder / task.name).open("a") as file:
        file.write("ran\n")
    if task.name.startswith("deadly") or (task.name.startswith("unlucky") and runs(task.folder, task.name) == 1):
        os._exit(9)
    if task.name.startswith("bug"):
        raise ZeroDivisionError("nobody foresaw it")
    if task.name == "refused":
        raise InputError("refused is no such file")
    if task.name == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if task.name == "hangs":
        time.sleep(600)
    if task.name.startswith("slow"):
        time.sleep(0.2)
    return len(before)


def runs(folder: Path, name: str) -> int:
    return len((folder / name).read_text().splitlines())


def silent(*_: object) -> None:
    """Tell nobody."""
