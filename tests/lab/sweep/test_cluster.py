"""A scheduler and its workers as an administrator starts them: what they make, and what becomes of it when they die."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from sa3_convert import scheduling
from sa3_convert.components import Component
from sa3_convert.lab.common import Common
from sa3_convert.lab.sweep.points import of_recipes
from sa3_convert.lab.sweep.result import Sweep
from sa3_convert.lab.sweep.sweep import run_sweep
from sa3_convert.lab.sweep.tasks import Ran, Task
from sa3_convert.recipe import load_recipe, own_recipes
from sa3_convert.scheduling import in_this_process, on_dask
from tests.clusters import ADDRESS, cluster
from tests.played import quick, runs, silent, task
from tests.processes import ended

pytest.importorskip("distributed")
pytestmark = pytest.mark.slow


def test_a_scheduler_that_was_started_again_is_asked_for_what_is_missing(tmp_path: Path) -> None:
    tasks = [task("a", tmp_path), *(task(f"slow{n}", tmp_path, "a") for n in range(40))]
    with ExitStack() as restarts:
        scheduler, _ = restarts.enter_context(cluster("--resources", "memory=4"))

        found = {}
        for one, ran in on_dask(scheduling.scheduler(ADDRESS, silent), tasks, quick):
            found[one.name] = ran
            if len(found) == 10:
                scheduler.kill()
                scheduler.wait()
                restarts.enter_context(cluster())
                time.sleep(1)
    assert found == {one.name: ran for one, ran in in_this_process(tasks, quick)}
    again = sum(runs(tmp_path, one.name) > 2 for one in tasks)
    assert again < 20


def table(found: Sweep) -> list[dict[str, object]]:
    """Return all that is known of the points but what depends on the clock."""
    return [point.model_dump(exclude={"seconds"}) for point in found.points]


def test_twelve_points_are_the_same_where_a_worker_is_killed_and_the_scheduler_started_again(
    toy: Path, tmp_path: Path
) -> None:
    recipes = [load_recipe(own_recipes()[name]) for name in ("fp32", "fp16", "int8", "card", "balanced", "small")]
    components = Component.NUMBER_CONDITIONER, Component.DECODER
    # Of one component some recipes say the same: points of several names, stages of one.
    points = of_recipes(recipes, components)
    assert len(points) == 12
    died: list[str] = []
    with ExitStack() as restarts:
        scheduler, worker, _ = restarts.enter_context(cluster(workers=2))

        def report(one: Task, ran: Ran, done: int, of: int) -> None:
            if done >= of // 4 and worker.poll() is None:
                died.append("worker")
                worker.kill()
                worker.wait()
            elif done >= of // 2 and scheduler.poll() is None:
                died.append("scheduler")
                scheduler.kill()
                scheduler.wait()
                restarts.enter_context(cluster(workers=2))

        runner = partial(on_dask, scheduling.scheduler(ADDRESS, silent))
        found = run_sweep(Common(toy, tmp_path / "there", threads=1), points, runner, report)
    alone = run_sweep(Common(toy, tmp_path / "here", threads=1), points)
    assert died == ["worker", "scheduler"]
    assert not found.missing
    assert table(found) == table(alone)


def test_an_interrupt_ends_all_workers_and_the_same_command_goes_on(toy: Path, tmp_path: Path) -> None:
    names = [word for name in ("fp16", "int8", "fp32", "small") for word in ("--recipe", name)]
    words = ["sweep", str(toy), "--component", "number_conditioner", *names, "--workers", "2"]
    command = [sys.executable, "-m", "sa3_convert", *words, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    kept = tmp_path / ".sa3-convert-cache" / "export"
    waited = time.monotonic() + 120
    while not (kept.is_dir() and any(kept.iterdir())) and time.monotonic() < waited:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert ended(process.pid)
    assert not (tmp_path / "out" / "sweep.json").exists()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert (tmp_path / "out" / "sweep.json").exists()
