"""Tasks in this process and on Dask: the same results, and what becomes of workers that die."""

import contextlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from sa3_convert import scheduling
from sa3_convert.errors import BackendError, InputError, Sa3Error
from sa3_convert.scheduling import Latest, in_this_process, let_go, local_workers, on_dask, simulated
from tests.played import quick, runs, silent, task

distributed = pytest.importorskip("distributed")


def test_a_task_gets_what_it_needs_and_each_comes_when_it_is_done(tmp_path: Path) -> None:
    tasks = [task("a", tmp_path), task("b", tmp_path), task("c", tmp_path, "a", "b")]
    outcomes = in_this_process(tasks, quick)
    assert next(outcomes)[0] is tasks[0]
    assert not (tmp_path / "b").exists()
    assert [(one.name, handed) for one, handed in outcomes] == [("b", 0), ("c", 2)]


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
    tasks += [task("refused", tmp_path), task("full", tmp_path)]
    before = dict(os.environ)
    found = {one.name: outcome for one, outcome in on_dask(local_workers(2, silent), tasks, quick)}
    assert dict(os.environ) == before
    sound = tasks[:7]
    assert [(one, found[one.name]) for one in sound] == list(in_this_process(sound, quick))
    # A worker died under it once, and it was run again; more often where another death took its result along.
    assert not isinstance(found["unlucky"], Sa3Error)
    assert runs(tmp_path, "unlucky") >= 2
    codes = {name: outcome.exit_code for name, outcome in found.items() if isinstance(outcome, Sa3Error)}
    assert codes == {"bug": 70, "deadly": 4, "after": 4, "refused": 3, "full": 3}
    assert "ended while it ran" in str(found["deadly"])
    assert "ended while it ran" in str(found["after"])
    assert "nobody foresaw it" in str(found["bug"])
    assert str(found["refused"]) == "refused is no such file"
    assert "The disk is full" in str(found["full"])


def test_what_no_worker_has_memory_for_is_refused_before_one_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "LocalCluster", None)
    with pytest.raises(InputError, match=r"needs 1024\.0 GiB and the largest worker has"):
        list(on_dask(local_workers(1, silent), [task("a", tmp_path, memory=2**40)], quick))


@pytest.mark.parametrize(("asked", "processors", "tasks", "started"), [(256, 2, 9, 2), (256, 8, 3, 3), (2, 8, 9, 2)])
def test_no_more_workers_are_started_than_can_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int, processors: int, tasks: int, started: int
) -> None:
    class Started(Exception):  # noqa: N818
        pass

    def start(n_workers: int, **_: object) -> None:
        raise Started(n_workers)

    told: list[str] = []
    monkeypatch.setattr(scheduling, "usable_processors", lambda: processors)
    monkeypatch.setattr(distributed, "LocalCluster", start)
    with pytest.raises(Started, match=str(started)):
        list(on_dask(local_workers(asked, told.append), [task(f"a{n}", tmp_path) for n in range(tasks)], quick))
    assert ["processors" in line for line in told] == [True] * (started < min(asked, tasks))


def test_nothing_is_started_where_nothing_is_left_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "LocalCluster", None)
    assert list(on_dask(local_workers(2, silent), [], quick)) == []


def test_what_the_caller_raises_is_not_taken_for_a_scheduler_that_is_gone(tmp_path: Path) -> None:
    outcomes = on_dask(local_workers(1, silent), [task("a", tmp_path), task("b", tmp_path)], quick)
    with pytest.raises(BrokenPipeError), contextlib.closing(outcomes):
        raise BrokenPipeError(next(outcomes))


def test_a_scheduler_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scheduling, "_WAIT", 1)
    with pytest.raises(BackendError, match="No scheduler answers at tcp"):
        list(on_dask(scheduling.scheduler("tcp://127.0.0.1:1", silent), [task("a", tmp_path)], quick))


def test_what_was_opened_last_stays_until_another_takes_its_place() -> None:
    said: list[str] = []
    latest = Latest[str, str]()

    def opened(name: str, *, fails: bool = False) -> str:
        def open_it(stack: contextlib.ExitStack) -> str:
            stack.callback(said.append, f"closed {name}")
            if fails:
                raise InputError(name)
            said.append(f"opened {name}")
            return name.upper()

        return latest.of(name, open_it)

    assert [opened("a"), opened("a"), opened("b")] == ["A", "A", "B"]
    assert said == ["opened a", "closed a", "opened b"]
    with pytest.raises(InputError):
        opened("c", fails=True)
    # Nothing of it is left, nor taken for it.
    assert said[3:] == ["closed b", "closed c"]
    assert opened("c") == "C"
    latest.close()
    latest.close()
    assert said[5:] == ["opened c", "closed c"]


def test_of_all_kinds_a_process_keeps_one() -> None:
    said: list[str] = []

    def opened(stack: contextlib.ExitStack, name: str) -> str:
        stack.callback(said.append, f"{name} closed")
        return name

    first, second = Latest[str, str](), Latest[str, str]()
    first.of("a", partial(opened, name="a"))
    second.of("a", partial(opened, name="b"))
    assert said == ["a closed"]
    let_go()
    let_go()
    assert said == ["a closed", "b closed"]


def test_a_process_that_comes_to_no_end_with_a_task_is_ended_and_tells_where(tmp_path: Path) -> None:
    def within(seconds: float, name: str) -> subprocess.CompletedProcess[str]:
        lines = [
            "import time; from pathlib import Path",
            "from sa3_convert.scheduling import _within; from tests.played import quick, task",
            f"print(_within({seconds}, quick, task({name!r}, Path({str(tmp_path)!r}))))",
            "time.sleep(1)",
        ]
        return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)

    in_time = within(0.9, "a")
    assert (in_time.returncode, in_time.stdout, in_time.stderr) == (0, "0\n", "")
    hung = within(0.5, "hangs")
    assert hung.returncode == 1
    assert "played.py" in hung.stderr
    assert "in quick" in hung.stderr


@pytest.mark.slow
def test_a_task_that_hangs_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_limit", lambda _: 10.0)
    tasks = [task("hangs", tmp_path), task("after", tmp_path, "hangs"), *(task(f"a{n}", tmp_path) for n in range(4))]
    found = {one.name: outcome for one, outcome in on_dask(local_workers(2, silent), tasks, quick)}
    assert {name for name, outcome in found.items() if isinstance(outcome, Sa3Error)} == {"hangs", "after"}
    assert "comes to no end within 0.0 hours" in str(found["hangs"])
