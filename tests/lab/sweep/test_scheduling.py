"""Tasks in this process and on Dask: the same results, and what becomes of workers that die."""

from pathlib import Path

import pytest

from sa3_convert.errors import BackendError, InputError
from sa3_convert.lab.sweep import scheduling
from sa3_convert.lab.sweep.scheduling import in_this_process, local_workers, on_dask, simulated
from tests.lab.sweep.played import quick, quiet, runs, silent, task

distributed = pytest.importorskip("distributed")


def test_a_task_gets_what_it_needs_and_each_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    tasks = [task("a", tmp_path), task("b", tmp_path), task("c", tmp_path, "a", "b")]
    found = in_this_process(tasks, lambda one, ran, done, of: told.append((one.name, done, of)), quick)
    assert found["c"].bytes == 2
    assert told == [("a", 1, 3), ("b", 2, 3), ("c", 3, 3)]


@pytest.mark.parametrize(("workers", "seconds", "efficiency"), [(1, 9, 1.0), (2, 5, 0.9), (4, 3, 0.75), (100, 3, 0.03)])
def test_a_simulation_keeps_workers_busy_and_needs_in_order(
    tmp_path: Path, workers: int, seconds: float, efficiency: float
) -> None:
    first = task("a", tmp_path)
    chains = [[task(f"b{n}", tmp_path, "a"), task(f"c{n}", tmp_path, "a", f"b{n}")] for n in range(4)]
    found = simulated([first, *(one for chain in chains for one in chain)], workers)
    assert found.seconds == seconds
    assert found.efficiency == pytest.approx(efficiency)
    assert found.longest_chain == 3


def test_what_the_cache_has_is_not_waited_for(tmp_path: Path) -> None:
    assert simulated([task("b", tmp_path, "a")], 4).seconds == 1
    assert simulated([], 4).seconds == 0


def test_local_workers_give_what_this_process_gives(tmp_path: Path) -> None:
    tasks = [task("a", tmp_path), *(task(f"b{n}", tmp_path, "a") for n in range(6)), task("bug", tmp_path)]
    tasks += [task("unlucky", tmp_path, "a"), task("deadly", tmp_path), task("after", tmp_path, "deadly", "a")]
    found = on_dask(local_workers(2, silent), tasks, quiet, quick)
    sound = tasks[:7]
    assert {one.name: found[one.name] for one in sound} == in_this_process(sound, quiet, quick)
    # A worker died under it once, and it was run again; more often where another death took its result along.
    assert found["unlucky"].problem == ""
    assert runs(tmp_path, "unlucky") >= 2
    assert "ended while it ran" in found["deadly"].problem
    assert "ended while it ran" in found["after"].problem
    assert "nobody foresaw it" in found["bug"].problem
    assert (found["deadly"].exit_code, found["bug"].exit_code) == (4, 70)


def test_what_no_worker_has_memory_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs 1024\.0 GiB and the largest worker has"):
        on_dask(local_workers(1, silent), [task("a", tmp_path, memory=2**40)], quiet, quick)


def test_a_scheduler_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scheduling, "_WAIT", 1)
    with pytest.raises(BackendError, match="No scheduler answers at tcp"):
        on_dask(scheduling.scheduler("tcp://127.0.0.1:1", silent), [task("a", tmp_path)], quiet, quick)
