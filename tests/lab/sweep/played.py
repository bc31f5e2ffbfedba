"""What the workers of the tests run instead of stages."""

import os
import time
from pathlib import Path

from sa3_convert.components import Component
from sa3_convert.convert.plan import Estimate
from sa3_convert.lab.sweep.tasks import Common, Ran, Task
from sa3_convert.recipe import ComponentRecipe


def task(name: str, folder: Path, *needs: str, memory: int = 1) -> Task:
    recipe = ComponentRecipe(floor_db=1)
    return Task(name, "mnn", Common(folder, folder), Component.DIT, recipe, needs, Estimate(1.0, memory))


def quick(task: Task, *before: Ran) -> Ran:
    """Leave a mark of each run beside the cache; do as the task's name says."""
    with (task.common.cache / task.name).open("a") as file:
        file.write("ran\n")
    if any(one.problem for one in before):
        return Ran(0.0, "a", "3.6.1", problem=next(one.problem for one in before if one.problem), exit_code=4)
    if task.name.startswith("deadly") or (task.name.startswith("unlucky") and runs(task.common.cache, task.name) == 1):
        os._exit(9)
    if task.name.startswith("bug"):
        raise ZeroDivisionError("nobody foresaw it")
    if task.name.startswith("slow"):
        time.sleep(0.2)
    return Ran(1.0, "a", "3.6.1", bytes=len(before))


def runs(folder: Path, name: str) -> int:
    return len((folder / name).read_text().splitlines())


def silent(*_: object) -> None:
    """Tell nobody."""


def quiet(task: Task, ran: Ran, done: int, of: int) -> None:
    """Report to nobody."""
