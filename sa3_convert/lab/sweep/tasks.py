"""What a sweep, or one conversion, consists of: stages, each named by the hash that the stage cache uses.

A task carries what it needs to be run anywhere: on another processor or with another MNN it finds nothing in the cache
that it may use, makes what it reads itself, and says where it ran.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sa3_convert.bundle.manifest import Fidelity
from sa3_convert.components import Component
from sa3_convert.convert.cache import CachedResult, FidelityNotes, StageCache
from sa3_convert.convert.conversion import make_stage
from sa3_convert.convert.plan import ConvertRequest, estimate, plan, stage_keys
from sa3_convert.convert.stages import STAGES, ComponentJob, StageKeys
from sa3_convert.errors import BackendError, Sa3Error, told_by_system
from sa3_convert.lab.common import Common
from sa3_convert.lab.sweep.points import Point
from sa3_convert.mnn.compatibility import MnnVersion, mnn_version, target_for
from sa3_convert.recipe import ComponentRecipe
from sa3_convert.scheduling import Estimate, Runner, let_go
from sa3_convert.system.machine import machine

JUDGED: Final = "verify"
"""The stage whose result is a point."""


@dataclass(frozen=True, slots=True)
class Task:
    """One stage of one component by one recipe."""

    name: str
    stage: str
    common: Common
    component: Component
    recipe: ComponentRecipe
    needs: tuple[str, ...]
    """Names of tasks whose results this reads."""
    takes: Estimate
    keys: StageKeys
    """Of all stages of its component, where the command was given."""
    mnn: str
    """The version there."""
    target_mnn: MnnVersion | None = None
    """The oldest MNN to be right on; None is the oldest that reads the recipe's types."""
    rank: int | None = None
    """Of the slots for adapters."""

    def job(self) -> ComponentJob:
        """Open the component."""
        target = target_for(self.recipe, self.target_mnn)
        return ComponentJob(self.common.open(), self.component, self.recipe, target, self.common.threads, self.rank)

    def is_done(self) -> bool:
        """Whether somebody has its result."""
        return self.common.has(self.stage, self.keys[self.stage], STAGES[self.stage].notes)


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a task."""

    seconds: float
    """That it took; next to none where the cache had the result."""
    processor: str
    mnn: str
    bytes: int = 0
    """Of the model, where the task judges one."""
    fidelity: Fidelity | None = None
    problem: str = ""
    """Why there is no result."""
    exit_code: int = 0
    """The kind of problem."""

    @classmethod
    def lost(cls, error: Sa3Error) -> "Ran":
        """Return what is known of a task that came to no end: why."""
        return cls(0.0, "", "", problem=str(error), exit_code=error.exit_code)


def tasks_for(points: Sequence[Point], common: Common) -> dict[str, list[Task]]:
    """Return the tasks of each point by its name, in an order in which they can run; the last one judges it."""
    return {point.name: _tasks(point, common) for point in points}


def to_do(points: Sequence[Point], tasks: Mapping[str, Sequence[Task]]) -> dict[str, list[Task]]:
    """Return what the cache does not have of each point; what points share is the first one's."""
    seen: set[str] = set()
    found: dict[str, list[Task]] = {}
    for point in points:
        # What stands for a plan shares no more than its reference with others.
        found[point.name] = [
            task
            for task in tasks.get(point.name, ())
            if not (task.name in seen or task.is_done()) or not (point.planned or task.stage == "export")
        ]
        seen.update(task.name for task in found[point.name])
    return found


def _tasks(point: Point, common: Common) -> list[Task]:
    checkpoint = common.open()
    job = ComponentJob(checkpoint, point.component, point.recipe, target_for(point.recipe, None), common.threads)
    keys = stage_keys(job)
    shapes = (entry.shape for entry in checkpoint.stored(point.component).values())
    return _stages(job, keys, _upstream(keys), 4 * sum(math.prod(shape) for shape in shapes), common)


def make_on_workers(
    request: ConvertRequest,
    common: Common,
    runner: Runner,
    begin: Callable[[int], None] = lambda stages: None,
    told: Callable[[Task, float], None] = lambda task, seconds: None,
) -> None:
    """Leave in the cache the stages that a conversion has to run, several components at once.

    Args:
        request: of the conversion, which finds them there.
        common: what workers have of it.
        runner: of workers.
        begin: told how many stages there are, if any.
        told: told about each that is done, and the seconds that it took.

    Raises:
        Sa3Error: one of them failed.

    """
    tasks = [
        task
        for step in plan(request).steps
        for task in _stages(step.job, step.keys, step.todo, step.reference_bytes, common)
    ]
    if tasks:
        begin(len(tasks))
    with contextlib.closing(runner(tasks, make)) as outcomes:
        for task, outcome in outcomes:
            if isinstance(outcome, Sa3Error):
                raise outcome
            told(task, outcome)


def _stages(
    job: ComponentJob, keys: StageKeys, stages: Sequence[str], reference_bytes: int, common: Common
) -> list[Task]:
    names = {stage: f"{stage}-{job.component.value}-{keys[stage]}" for stage in stages}
    return [
        Task(
            name=name,
            stage=stage,
            common=common,
            component=job.component,
            recipe=job.recipe,
            needs=tuple(names[read] for read in STAGES[stage].reads if read in names),
            takes=estimate((stage,), reference_bytes, job.recipe),
            keys=keys,
            mnn=mnn_version(),
            target_mnn=job.target_mnn,
            rank=job.rank,
        )
        for stage, name in names.items()
    ]


def make(task: Task, *_: float) -> float:
    """Make a task's result where this is called, and return the seconds that it took.

    Raises:
        BackendError: it would be another one here.
        Sa3Error: it could not be made.

    """
    started = time.perf_counter()
    _made(task)
    return time.perf_counter() - started


def _upstream(keys: StageKeys, stage: str = JUDGED) -> list[str]:
    """Return a stage and all that it reads, in the order of their work."""
    needed = {stage}
    for name in reversed(tuple(keys)):
        if name in needed:
            needed.update(STAGES[name].reads)
    return [name for name in keys if name in needed]


def run_task(task: Task, *before: Ran) -> Ran:
    """Run a task where this is called; what the user can mend is in its result, after problems of what it needs."""
    started = time.perf_counter()
    # Its memory is all that it may take; what a worker holds of other work would come beside it.
    let_go()
    place = str(machine()["processor"]), mnn_version()
    for earlier in before:
        if earlier.problem:
            return Ran(0.0, *place, problem=earlier.problem, exit_code=earlier.exit_code)
    try:
        size, fidelity = _made(task, with_other_mnn=True)
    except Exception as error:
        known = error if isinstance(error, Sa3Error) else told_by_system(error)
        if known is None:
            raise
        return Ran(time.perf_counter() - started, *place, problem=str(known), exit_code=known.exit_code)
    return Ran(time.perf_counter() - started, *place, size, fidelity)


def _made(task: Task, *, with_other_mnn: bool = False) -> tuple[int, Fidelity | None]:
    """Find or make a task's result and all that it reads; returns bytes and fidelity where it judges a model.

    With another MNN it has a name of its own. Whatever else it depends on is the same here, or it is refused.
    """
    job = task.job()
    keys = stage_keys(job)
    free = with_other_mnn and mnn_version() != task.mnn
    if any(
        keys[name] != task.keys.get(name)
        for name in _upstream(keys, task.stage)
        if not (free and "MNN" in STAGES[name].tools)
    ):
        raise BackendError(
            "A worker has another version of sa3-convert or of its tools, or another checkpoint under this path, than "
            "where the command was given. What it makes would be of something else."
        )
    for name in _upstream(keys, task.stage):

        def make(stages: StageCache, name: str = name) -> CachedResult[Any]:
            return make_stage(job, name, keys[name], stages, lambda done, of: None)

        job.results[name] = task.common.found_or_made(name, keys[name], STAGES[name].notes, make)
    notes = job.results[task.stage].notes
    if not isinstance(notes, FidelityNotes):
        return 0, None
    folder = job.results["mnn"].folder
    return sum((folder / file).stat().st_size for file in job.results["mnn"].files), notes.fidelity
