"""Where tasks run: in this process, or on Dask's workers. What a task is they need not know but for its name,
the tasks whose results it reads, and what it takes.
"""

import contextlib
import faulthandler
import heapq
import importlib.util
import math
import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Protocol, TypeVar

from sa3_convert.errors import BackendError, ConversionError, InputError, Sa3Error, told_by_system
from sa3_convert.system.machine import available_memory, default_threads, usable_processors

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a piece of work takes."""

    seconds: float
    memory_bytes: int
    """At the most, in one process."""


BESIDE_WEIGHTS: Final = 1 << 30
"""Bytes that generating or verifying takes beside weights: of generations 0.3 to 0.8 GiB were measured, from 10 to 120
seconds of audio."""


class Task(Protocol):
    """Something that can be done anywhere."""

    @property
    def name(self) -> str:
        """Its own among those that run together."""
        ...

    @property
    def needs(self) -> Sequence[str]:
        """Names of tasks whose results it is handed; they stand before it."""
        ...

    @property
    def takes(self) -> Estimate:
        """What it takes."""
        ...


_Task = TypeVar("_Task", bound=Task)
_Result = TypeVar("_Result")
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
Outcomes = Generator[tuple[_Task, _Result | Sa3Error], None, None]
"""Each task when it is done, with its result, or why there is none."""


class Runner(Protocol):
    """Runs tasks: `in_this_process`, or `on_dask` with what connects it."""

    def __call__(self, tasks: Sequence[_Task], run: Callable[..., _Result]) -> Outcomes[_Task, _Result]:
        """Run tasks; `run` takes one, and the result of each that it needs."""
        ...


Tell = Callable[[str], None]
Connect = Callable[[Sequence[Task]], contextlib.AbstractContextManager["Client"]]
"""Reaches workers for some tasks."""

MEMORY: Final = "memory"
"""The resource, in bytes, that workers of a scheduler may declare: `dask worker --resources "memory=16e9"`."""
_CONNECTIONS: Final = 5
"""How often a scheduler may go away before what is left is given up."""
_DEATHS: Final = 1
"""Workers, of those that are started here, that a task may take with it and be tried again beside others."""
_PATIENCE: Final = 20
"""How many times what a task is estimated to take it may take on a worker, beside an hour."""
_HOUR: Final = 3600.0
_WAIT: Final = 60
"""Seconds for a scheduler to be reached, or a worker to come."""


class Latest(Generic[_Key, _Value]):
    """What a worker has opened last: the next task with the same key finds it, another key takes its place.

    Of all kinds a process keeps one: a task's memory is for that task alone.
    """

    kinds: ClassVar[list["Latest[Any, Any]"]] = []

    def __init__(self) -> None:
        self.kinds.append(self)
        self._opened: tuple[_Key, _Value] | None = None
        self._kept = contextlib.ExitStack()

    def of(self, key: _Key, open_it: Callable[[contextlib.ExitStack], _Value]) -> _Value:
        """Return what was opened with a key; what had another one is closed before this is opened."""
        if self._opened is None or self._opened[0] != key:
            let_go()
            with contextlib.ExitStack() as stack:
                self._opened = key, open_it(stack)
                self._kept = stack.pop_all()
        return self._opened[1]

    def close(self) -> None:
        """Close what is kept."""
        self._opened = None
        self._kept.close()


def let_go() -> None:
    """Close what this process keeps, of whichever kind."""
    for kind in Latest.kinds:
        kind.close()


def in_this_process(tasks: Sequence[_Task], run: Callable[..., _Result]) -> Outcomes[_Task, _Result]:
    """Run tasks one after the other, each when it is asked for; what one raises ends them all."""
    done: dict[str, _Result] = {}
    for task in tasks:
        done[task.name] = run(task, *(done[name] for name in task.needs))
        yield task, done[task.name]


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


def on_dask(connect: Connect, tasks: Sequence[_Task], run: Callable[..., _Result]) -> Outcomes[_Task, _Result]:
    """Run tasks on workers, each where there is memory for it, and yield them as they are done.

    What a task raises is its outcome, and that of those that need it. A worker that dies costs its task one of few
    tries; a scheduler that goes away is waited for, and asked again for what is missing.

    Raises:
        BackendError: no scheduler or no worker can be reached.
        InputError: no worker has the memory that a task needs.

    """
    done: dict[str, _Result | Sa3Error] = {}
    for _ in range(_CONNECTIONS):
        missing = [task for task in tasks if task.name not in done]
        if not missing:
            return
        with contextlib.suppress(*_gone()), connect(missing) as client:
            _require_workers(client, missing)
            yield from _round(client, missing, done, run)
    for task in tasks:
        if task.name not in done:
            yield task, BackendError("The scheduler went away too often.")


def _gone() -> tuple[type[BaseException], ...]:
    """Return what is raised where a scheduler is not there any more."""
    from concurrent.futures import CancelledError as CancelledFuture

    import distributed
    from distributed.comm import CommClosedError

    return CommClosedError, distributed.CancelledError, CancelledFuture, distributed.TimeoutError, ConnectionError


def _round(
    client: "Client", todo: Sequence[_Task], done: dict[str, _Result | Sa3Error], run: Callable[..., _Result]
) -> Outcomes[_Task, _Result]:
    """Run what is not done, until it is or the scheduler is gone.

    Dask blames a death on all that its worker had before it. So each task that is blamed runs once more, alone.
    """
    from distributed import KilledWorker, as_completed

    limited = bool(_memory_of_workers(client))
    futures: dict[str, Any] = {}

    def submit(task: Task) -> Any:
        before = [done[name] if name in done else futures[name] for name in task.needs]
        if errors := [one for one in before if isinstance(one, Sa3Error)]:
            return client.submit(_passed_on, errors[0], key=(task.name, len(futures)), pure=False)
        resources = {MEMORY: task.takes.memory_bytes} if limited else None
        work = (_within, _limit(task), run, task, *before)
        return client.submit(*work, key=(task.name, len(futures)), resources=resources, pure=False)

    def finished(task: _Task, future: Any) -> tuple[_Task, _Result | Sa3Error]:
        error = future.exception()
        done[task.name] = future.result() if error is None else _lost(task, error)
        return task, done[task.name]

    for task in todo:
        futures[task.name] = submit(task)
    of = {future.key: task for task, future in zip(todo, futures.values(), strict=True)}
    for future in as_completed(list(futures.values()), loop=client.loop):
        if future.status in ("cancelled", "lost"):
            raise ConnectionError
        if not (future.status == "error" and isinstance(future.exception(), KilledWorker)):
            yield finished(of[future.key], future)
    for task in todo:
        if task.name not in done:
            yield finished(task, submit(task))


def _passed_on(error: Sa3Error) -> None:
    raise error


def _limit(task: Task) -> float:
    return _HOUR + _PATIENCE * task.takes.seconds


def _within(seconds: float, run: Callable[..., _Result], task: Task, *before: object) -> _Result:
    """Run a task, and end this process when so many seconds are over: nothing else stops what hangs in a library.

    Standard error, a worker's log, then has the lines where each thread was.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        return run(task, *before)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _lost(task: Task, error: BaseException) -> Sa3Error:
    """Return what is said of a task whose workers died, or that failed."""
    from distributed import KilledWorker

    if isinstance(error, Sa3Error):
        return error
    if isinstance(error, KilledWorker):
        return ConversionError(
            "Worker after worker ended while it ran there; was there memory for it? One that comes to no end within "
            f"{_limit(task) / _HOUR:.1f} hours is ended, too, and its log says where."
        )
    known = told_by_system(error) if isinstance(error, Exception) else None
    return known or Sa3Error(repr(error))


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
    if memory := _memory_of_workers(client):
        _require_memory(tasks, max(memory))


def _require_memory(tasks: Sequence[Task], largest: float) -> None:
    most = max(task.takes.memory_bytes for task in tasks)
    if most > largest:
        raise InputError(
            f"A task needs {most / 2**30:.1f} GiB and the largest worker has {largest / 2**30:.1f} GiB. "
            "Take fewer workers on this machine, or larger ones."
        )


def scheduler(address: str, tell: Tell) -> Connect:
    """Return what connects to a scheduler that somebody started."""
    from distributed import Client

    def connect(tasks: Sequence[Task]) -> "contextlib.AbstractContextManager[Client]":
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


def threads_each(workers: int) -> int:
    """Return how many threads each of some workers of this machine computes with, when nobody says."""
    return max(1, default_threads() // workers)


@contextlib.contextmanager
def _environment_restored() -> Iterator[None]:
    """Put this process's environment back in the end: Dask sets its workers' variables here before it starts them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def local_workers(count: int, tell: Tell) -> Connect:
    """Return what starts workers on this machine, which share its processors and its memory.

    No more than there are processors, or tasks: what is beyond that only takes memory.
    """
    import dask
    from distributed import Client, LocalCluster

    @contextlib.contextmanager
    def connect(tasks: Sequence[Task]) -> "Iterator[Client]":
        workers = min(count, usable_processors(), len(tasks))
        if workers < min(count, len(tasks)):
            tell(f"This machine has {usable_processors()} processors; so many workers are started.")
        free = available_memory()
        if free is not None:
            _require_memory(tasks, free / workers)
        environment = {
            "OMP_NUM_THREADS": str(max(1, usable_processors() // workers)),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        }
        settings = {
            "distributed.nanny.pre-spawn-environ": environment,
            "distributed.scheduler.allowed-failures": _DEATHS,
        }
        has_dashboard = importlib.util.find_spec("bokeh") is not None
        with (
            _environment_restored(),
            dask.config.set(settings),
            LocalCluster(
                host="127.0.0.1",
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=None,
                resources={} if free is None else {MEMORY: free / workers},
                dashboard_address="127.0.0.1:0" if has_dashboard else None,
                silence_logs=50,
                preload=[__name__],
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            if has_dashboard:
                tell(f"Dashboard: {client.dashboard_link}")
            yield client

    return connect
