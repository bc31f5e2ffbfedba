"""How long generations take on each engine, side by side: interleaved, so that ratios hold on a noisy machine."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.runtime.checks import CHECKS
from sa3_convert.runtime.contenders import Contender
from sa3_convert.runtime.lengths import lengths
from sa3_convert.runtime.peak_memory import peak_memory
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.timed import Clock

PROMPT = "warm analog synth pad with slow attack, 90 BPM"
Temperature = Literal["cold", "warm"]


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds of one generation; the parts add up to `total`."""

    load: float
    """Loading models; 0 when they were kept."""
    text_encoder: float
    number_conditioner: float
    dit: float
    decoder: float
    other: float
    """Everything outside the engine's own calls: tokens, noise, sampler, windows, checks."""
    dit_runs: int

    @property
    def total(self) -> float:
        """The whole generation."""
        return self.load + self.text_encoder + self.number_conditioner + self.dit + self.decoder + self.other

    @property
    def dit_step(self) -> float:
        """One run of the DiT."""
        return self.dit / self.dit_runs


@dataclass(frozen=True, slots=True)
class Row:
    """One engine at one duration, cold or warm."""

    engine: str
    duration: float
    """Seconds of audio."""
    temperature: Temperature
    """Cold: the first generation, models loaded in it (from the system's file cache, if they are there). Warm: later
    ones with the models kept."""
    figures: Figures
    """Of the run with the median total."""
    totals: tuple[float, ...]
    """Of all runs, in order."""
    peak_bytes: int | None
    """Resident memory of a process of its own that loads each model for its stage."""

    @property
    def real_time_factor(self) -> float:
        """Seconds of audio per second of work."""
        return self.duration / self.figures.total

    def to_json(self) -> dict[str, Any]:
        """Return all figures, derived ones included."""
        figures = dataclasses.asdict(self.figures)
        figures |= {"dit_step": self.figures.dit_step, "total": self.figures.total}
        return {
            "engine": self.engine,
            "duration": self.duration,
            "temperature": self.temperature,
            "seconds": {name: value for name, value in figures.items() if name != "dit_runs"},
            "dit_runs": self.figures.dit_runs,
            "real_time_factor": self.real_time_factor,
            "totals": list(self.totals),
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What to measure."""

    contenders: tuple[Contender, ...]
    durations: tuple[float, ...]
    repeats: int = 3
    """Warm generations per engine and duration."""
    steps: int | None = None
    memory: bool = True
    """Also measure peak memory, which takes one more generation of one step each."""


Report = Callable[[str], None]


def bench(request: BenchRequest, report: Report) -> list[Row]:
    """Measure every engine at every duration.

    Args:
        request: what to measure.
        report: called with a line before each measurement.

    Raises:
        UsageError: nothing to measure, or a duration that the model cannot generate; found before the first one.
        Sa3Error: an engine cannot run the models.

    """
    if not request.contenders or not request.durations or request.repeats < 1:
        raise UsageError("Give at least one engine, one duration and one repeat.")
    with request.contenders[0].open(Clock(), keep_loaded=False) as pipeline:
        for duration in request.durations:
            lengths(pipeline.layout, duration)
    return [row for duration in request.durations for row in _at_duration(request, duration, report)]


def _at_duration(request: BenchRequest, duration: float, report: Report) -> list[Row]:
    generation = GenerateRequest(PROMPT, seconds=duration, steps=request.steps)
    runs: dict[str, list[Figures]] = {contender.name: [] for contender in request.contenders}
    with ExitStack() as stack:
        clocks = {contender.name: Clock() for contender in request.contenders}
        pipelines = {
            contender.name: stack.enter_context(contender.open(clocks[contender.name], keep_loaded=True))
            for contender in request.contenders
        }
        for turn in range(1 + request.repeats):
            # Every other turn backwards, so that no engine always follows the same one.
            for name in (list(runs), list(reversed(runs)))[turn % 2]:
                report(f"{duration:g} s, {name}, {'cold' if turn == 0 else f'warm {turn} of {request.repeats}'}")
                runs[name].append(measured(pipelines[name], generation, clocks[name]))
    peaks: dict[str, int | None] = dict.fromkeys(runs)
    if request.memory:
        single = GenerateRequest(PROMPT, seconds=duration, steps=1)
        for contender in request.contenders:
            report(f"{duration:g} s, {contender.name}, memory")
            peaks[contender.name] = peak_memory(contender, single)
    rows = []
    for name, (cold, *warm) in runs.items():
        rows.append(Row(name, duration, "cold", cold, (cold.total,), peaks[name]))
        rows.append(Row(name, duration, "warm", median_run(warm), tuple(f.total for f in warm), peaks[name]))
    return rows


def measured(pipeline: Pipeline, request: GenerateRequest, clock: Clock) -> Figures:
    """Generate once and return where the time went.

    Args:
        pipeline: over a `TimedEngine` of `clock`.
        request: what to generate; its output is not checked, because seeded weights make noise.
        clock: is reset first.

    """
    clock.reset()
    start = time.perf_counter()
    for _ in pipeline.stream(request, allow=CHECKS):
        pass
    total = time.perf_counter() - start
    return Figures(
        load=clock.load,
        text_encoder=clock.run[Component.TEXT_ENCODER],
        number_conditioner=clock.run[Component.NUMBER_CONDITIONER],
        dit=clock.run[Component.DIT],
        decoder=clock.run[Component.DECODER],
        other=total - clock.load - sum(clock.run.values()),
        dit_runs=clock.runs[Component.DIT],
    )


def median_run(runs: Sequence[Figures]) -> Figures:
    """Return the run whose total is the median (the lower one of an even number), so that its parts add up."""
    return sorted(runs, key=lambda figures: figures.total)[(len(runs) - 1) // 2]
