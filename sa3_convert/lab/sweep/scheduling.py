"""Where the tasks of a sweep run: in this process, or on Dask's workers."""

import contextlib
import heapq
import importlib.util
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sa3_convert.errors import BackendError, ConversionError, InputError, Sa3Error
from sa3_convert.lab.sweep.tasks import Ran, Task, run_task
from sa3_convert.system.machine import available_memory, usable_processors

if TYPE_CHECKING:
    from distributed import Client

Report = Callable[[Task, Ran, int, int], None]
"""(what ran, what came of it, how many are done, of how many)."""
Tell = Callable[[str], None]
Run = Callable[..., Ran]
"""(task, what came of each task that it needs)."""
Connect = Callable[[], contextlib.AbstractContextManager["Client"]]

MEMORY: Final = "memory"
"""The resource, in bytes, that workers of a scheduler may declare: `dask worker --resources "memory=16e9"`."""
_CONNECTIONS: Final = 5
"""How often a scheduler may go away before what is left is given up."""
_DEATHS: Final = 2
"""Workers, of those that are started here, that a task may take with it and be tried again."""
_WAIT: Final = 60
"""Seconds for a scheduler to be reached, or a worker to come."""


def in_this_process(tasks: Sequence[Task], report: Report, run: Run = run_task) -> dict[str, Ran]:
    """Run tasks one after the other."""
    done: dict[str, Ran] = {}
    for task in tasks:
        done[task.name] = run(task, *(done[name] for name in task.needs))
        report(task, done[task.name], len(done), len(tasks))
    return done


@dataclass(frozen=True, slots=True)
class Simulated:
    """What tasks would take on a number of workers."""

    seconds: float
    efficiency: float
    """Share of the workers' time in which they work."""
    longest_chain: float
    """Seconds of the tasks that follow from one another, which no number of workers shortens."""


def simulated(tasks: Sequence[Task], workers: int) -> Simulated:
    """Return what tasks take, as stages were measured, if each goes to the first worker that is free."""
    left, free = list(tasks), [0.0] * workers
    # What is not among them has its result.
    ended = dict.fromkeys((name for task in tasks for name in task.needs), 0.0)
    chain = dict(ended)
    ended.update(dict.fromkeys((task.name for task in tasks), math.inf))
    while left:
        idle = heapq.heappop(free)
        # The first whose needs are there, or that whose needs will be there first.
        ready = [(max([idle, *(ended[name] for name in task.needs)]), task) for task in left]
        begun, task = min(ready, key=lambda one: one[0])
        left.remove(task)
        ended[task.name] = begun + task.takes.seconds
        chain[task.name] = task.takes.seconds + max((chain[name] for name in task.needs), default=0.0)
        heapq.heappush(free, ended[task.name])
    seconds, work = max(free), sum(task.takes.seconds for task in tasks)
    return Simulated(seconds, work / (workers * seconds) if seconds else 1.0, max(chain.values(), default=0.0))


def on_dask(connect: Connect, tasks: Sequence[Task], report: Report, run: Run = run_task) -> dict[str, Ran]:
    """Run tasks on workers, each where there is memory for it.

    A worker that dies costs its task one of few tries; a scheduler that goes away is waited for, and asked again for
    what is missing. What cannot be had then is a problem of its own task and of those that need it.

    Raises:
        BackendError: no scheduler or no worker can be reached.
        InputError: no worker has the memory that a task needs.

    """
    done: dict[str, Ran] = {}
    for _ in range(_CONNECTIONS):
        with contextlib.suppress(*_gone()), connect() as client:
            _require_workers(client, [task for task in tasks if task.name not in done])
            _round(client, tasks, done, report, run)
        if len(done) == len(tasks):
            return done
    for task in tasks:
        if task.name not in done:
            done[task.name] = Ran(
                0.0, "", "", problem="The scheduler went away too often.", exit_code=BackendError.exit_code
            )
            report(task, done[task.name], len(done), len(tasks))
    return done


def _gone() -> tuple[type[BaseException], ...]:
    """Return what is raised where a scheduler is not there any more."""
    from concurrent.futures import CancelledError as CancelledFuture

    import distributed
    from distributed.comm import CommClosedError

    return CommClosedError, distributed.CancelledError, CancelledFuture, distributed.TimeoutError, ConnectionError


def _round(client: "Client", tasks: Sequence[Task], done: dict[str, Ran], report: Report, run: Run) -> None:
    """Run what is not done, until it is or the scheduler is gone.

    Dask blames a death on all that its worker had before it. So each task that is blamed runs once more, alone.
    """
    from distributed import KilledWorker, as_completed

    limited = bool(_memory_of_workers(client))
    futures: dict[str, Any] = {}

    def submit(task: Task) -> Any:
        before = [done.get(name) or futures[name] for name in task.needs]
        resources = {MEMORY: task.takes.memory_bytes} if limited else None
        return client.submit(run, task, *before, key=(task.name, len(futures)), resources=resources, pure=False)

    def finish(task: Task, future: Any) -> None:
        error = future.exception()
        done[task.name] = future.result() if error is None else _lost(error)
        report(task, done[task.name], len(done), len(tasks))

    todo = [task for task in tasks if task.name not in done]
    for task in todo:
        futures[task.name] = submit(task)
    of = {future.key: task for task, future in zip(todo, futures.values(), strict=True)}
    for future in as_completed(futures.values(), loop=client.loop):
        if future.status in ("cancelled", "lost"):
            raise ConnectionError
        if not (future.status == "error" and isinstance(future.exception(), KilledWorker)):
            finish(of[future.key], future)
    for task in todo:
        if task.name not in done:
            finish(task, submit(task))


def _lost(error: BaseException | None) -> Ran:
    """Return what is said of a task whose workers died, or that failed in a way that nobody foresaw."""
    from distributed import KilledWorker

    died = isinstance(error, KilledWorker)
    said = "Worker after worker ended while it ran there; was there memory for it?" if died else repr(error)
    return Ran(0.0, "", "", problem=said, exit_code=ConversionError.exit_code if died else Sa3Error.exit_code)


def _memory_of_workers(client: "Client") -> list[float]:
    """Return what each worker that declares its memory has."""
    workers: Mapping[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    return [worker["resources"][MEMORY] for worker in workers.values() if MEMORY in worker.get("resources", {})]


def _require_workers(client: "Client", tasks: Sequence[Task]) -> None:
    import distributed

    try:
        client.wait_for_workers(1, timeout=_WAIT)
    except distributed.TimeoutError:
        raise BackendError(f"No worker came to the scheduler within {_WAIT} seconds.") from None
    memory = _memory_of_workers(client)
    most = max((task.takes.memory_bytes for task in tasks), default=0)
    if memory and most > max(memory):
        raise InputError(
            f"A task needs {most / 2**30:.1f} GiB and the largest worker has {max(memory) / 2**30:.1f} GiB. "
            "Take fewer workers on this machine, or larger ones."
        )


def scheduler(address: str, tell: Tell) -> Connect:
    """Return what connects to a scheduler that somebody started."""

    def connect() -> "contextlib.AbstractContextManager[Client]":
        from distributed import Client

        try:
            client = Client(address, timeout=_WAIT, set_as_default=False)
        except (OSError, ValueError) as error:
            raise BackendError(f"No scheduler answers at {address}: {error}") from None
        tell(f"Workers: {len(client.scheduler_info(n_workers=-1)['workers'])}. Dashboard: {client.dashboard_link}")
        if not _memory_of_workers(client):
            tell(f"They do not say what memory they have (--resources {MEMORY}=16e9): tasks may share too little.")
        return contextlib.closing(client)

    return connect


def dask_setup(_: object) -> None:
    """Leave an interrupt, which a terminal sends to all, to the process that started this worker; Dask calls this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def local_workers(count: int, tell: Tell) -> Connect:
    """Return what starts workers on this machine, which share its processors and its memory."""

    @contextlib.contextmanager
    def connect() -> "Iterator[Client]":
        import dask
        from distributed import Client, LocalCluster

        free = available_memory()
        resources = {} if free is None else {MEMORY: free / count}
        threads = max(1, usable_processors() // count)
        own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
        with (
            dask.config.set(
                {"distributed.nanny.pre-spawn-environ": own, "distributed.scheduler.allowed-failures": _DEATHS}
            ),
            LocalCluster(
                host="127.0.0.1",
                n_workers=count,
                threads_per_worker=1,
                memory_limit=None,
                resources=resources,
                dashboard_address="127.0.0.1:0" if importlib.util.find_spec("bokeh") else None,
                silence_logs=50,
                preload=[__name__],
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            if importlib.util.find_spec("bokeh"):
                tell(f"Dashboard: {client.dashboard_link}")
            yield client

    return connect
