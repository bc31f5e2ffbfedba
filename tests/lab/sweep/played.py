"""What the workers of the tests run instead of stages."""

import os
import time
from pathlib import Path

from sa3_convert.lab.sweep.tasks import Ran, Task


def quick(task: Task, *before: Ran) -> Ran:
    """Leave a mark of each run beside the cache; do as the task's name says."""
    with (task.common.cache / task.name).open("a") as file:
        file.write("ran\n")
    if any(one.problem for one in before):
        return Ran(0.0, "a", "3.6.1", problem=next(one.problem for one in before if one.problem), exit_code=4)
    if task.name.startswith("deadly") or (task.name.startswith("unlucky") and len(_marks(task)) == 1):
        os._exit(9)
    if task.name.startswith("bug"):
        raise ZeroDivisionError("nobody foresaw it")
    if task.name.startswith("slow"):
        time.sleep(0.2)
    return Ran(1.0, "a", "3.6.1", bytes=len(before))


def _marks(task: Task) -> list[str]:
    return Path(task.common.cache / task.name).read_text().splitlines()
