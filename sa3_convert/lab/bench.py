"""`bench`: how long generations take on each engine and in how much memory, interleaved, so that ratios hold.

As a program of its own (`python -m`) it makes one generation, and tells how much memory that took.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays, Floats, Session, free, host
from sa3_convert.bundle.manifest import SPLIT_KINDS
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.dimensions import AutoencoderLayout
from sa3_convert.components import Component
from sa3_convert.errors import BackendError, BundleError, UsageError
from sa3_convert.lab.doctor.results import saved
from sa3_convert.mnn.compatibility import require_backend
from sa3_convert.runtime.conditioning import lengths
from sa3_convert.runtime.engines import KINDS, Backend, Engine, EngineName, bundle_engine
from sa3_convert.runtime.output_checks import CHECKS
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.placement import placement
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.sampling import Noise
from sa3_convert.system import machine
from sa3_convert.system.supervisor import die_with_parent

PROMPT = "warm analog synth pad with slow attack, 90 BPM"
Temperature = Literal["cold", "warm"]
Peaks = tuple[int | None, int | None]
"""Bytes of memory, and of GPUs' memory."""

_ENGINES: Mapping[str, tuple[EngineName, Mapping[str, Any]]] = {
    "mnn": ("mnn", {}),
    "mnn-low": ("mnn", {"memory": "low"}),
    "mnn-split": ("mnn", {"split": True}),
    "onnxruntime": ("onnxruntime", {}),
    "onnxruntime-int8": ("onnxruntime-int8", {}),
    "onnxruntime-fp16": ("onnxruntime-fp16", {}),
    "torch": ("torch", {"padding": "value_zeroing"}),
}


class TimedEngine:
    """Loads another engine's models, and times them."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.settings = engine.name, engine.settings
        self._engine = engine
        self.reset()

    def reset(self) -> None:
        """Start at zero: seconds of loading, and of each component seconds within the engine's calls, and calls."""
        self.loading = 0.0
        self.seconds: defaultdict[Component, float] = defaultdict(float)
        self.runs: Counter[Component] = Counter()

    def noise(self, seed: int, draws: int) -> Noise:
        """Return the engine's own noise."""
        return self._engine.noise(seed, draws)

    def load(self, component: Component) -> Session:
        """Load a model; see `Engine.load`."""
        start = time.perf_counter()
        session = self._engine.load(component)
        self.loading += time.perf_counter() - start
        return _TimedSession(session, component, self)


class _TimedSession:
    def __init__(self, session: Session, component: Component, clock: TimedEngine) -> None:
        self._session, self._component, self._clock = session, component, clock

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        start = time.perf_counter()
        result = self._session.run(feeds)
        for array in result.values():
            # A device may still be at work; a number that is fetched has waited for it.
            host(array.reshape(-1)[:1])
        self._clock.seconds[self._component] += time.perf_counter() - start
        self._clock.runs[self._component] += 1
        return result

    def close(self) -> None:
        free(self._session)


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine with settings; plain data, so that another process can open the same."""

    name: str
    source: str
    """The bundle's folder; of torch, the checkpoint's."""
    engine: EngineName
    options: Mapping[str, Any] = field(default_factory=dict)
    manifest: str | None = None
    """SHA-256 of the manifest of the bundle that was checked."""
    as_reference: bool = False
    """Of torch: decode as the published reference does, instead of as `run` does."""

    def open(self, *, keep_loaded: bool) -> Pipeline:
        """Return a pipeline over a `TimedEngine`."""
        path = Path(self.source)
        pipeline: Pipeline = (
            (_AsReference if self.as_reference else Pipeline).from_checkpoint(
                path, keep_loaded=keep_loaded, **self.options
            )
            if self.engine == "torch"
            else Pipeline.from_bundle(path, self.engine, keep_loaded=keep_loaded, **self.options)
        )
        if pipeline.manifest is not None and self.manifest not in (None, pipeline.manifest.digest):
            raise BundleError(
                f"{self.source} was replaced by another bundle while it was measured. Run the command again."
            )
        pipeline.models.engine = TimedEngine(pipeline.models.engine)
        return pipeline


class _AsReference(Pipeline):
    """Decodes everything, padding included, in the published reference's own chunks."""

    def decode(self, latents: Floats, samples: int | None = None) -> Generator[Floats, None, None]:
        with self.models.use(Component.DECODER) as decoder:
            yield decoded_with_overlap(decoder, host(latents), self.layout.autoencoder)[:, :, :samples]


def decoded_with_overlap(
    decoder: Session, latents: Floats, layout: AutoencoderLayout, *, chunk: int = 128, overlap: int = 32
) -> Floats:
    """Decode as the published reference does by default: fixed chunks, half the overlap cut off at inner edges.

    Latents are [1, C, T], the audio [1, channels, T · downsampling ratio], chunk and overlap in latents.
    """
    ratio, total = layout.downsampling_ratio, latents.shape[2]
    if total < chunk:
        return decoder.run({"latents": latents})["audio"]
    starts = [*range(0, total - chunk, chunk - overlap), total - chunk]
    cut = overlap // 2
    audio = np.zeros((1, layout.audio_channels, total * ratio), np.float32)
    for start in starts:
        part = decoder.run({"latents": np.ascontiguousarray(latents[:, :, start : start + chunk])})["audio"]
        first = 0 if start == 0 else cut
        last = chunk if start == total - chunk else chunk - cut
        audio[:, :, (start + first) * ratio : (start + last) * ratio] = part[:, :, first * ratio : last * ratio]
    return audio


def contenders(
    bundle: Path,
    names: tuple[str, ...],
    *,
    checkpoint: Path | None = None,
    threads: int | None = None,
    backend: Backend = "cpu",
) -> tuple[Contender, ...]:
    """Return what was asked for; without names everything that the bundle can run, and torch if there is a checkpoint.

    On another device than the CPU MNN's components are where `run` places them.

    Raises:
        UsageError: no such engine, one is named twice, or torch without a checkpoint or the other way round.
        BundleError: the bundle, or a file that an engine needs, is missing or not what the manifest says.

    """
    opened = Bundle.open(bundle)
    kinds = {artifact.kind for artifact in opened.manifest.artifacts}
    if not names:
        names = tuple(
            n
            for n, (engine, options) in _ENGINES.items()
            if engine != "torch" and KINDS[engine] in kinds and ("split" not in options or SPLIT_KINDS[-1] in kinds)
        )
        names += ("torch",) if checkpoint is not None else ()
    if unknown := [name for name in names if name not in _ENGINES]:
        raise UsageError(f"There is no engine {unknown[0]!r} to measure. There are: {', '.join(_ENGINES)}.")
    if len(set(names)) != len(names):
        raise UsageError("An engine is named twice; --repeats says how often each is measured.")
    if ("torch" in names) != (checkpoint is not None):
        raise UsageError("The torch engine runs a checkpoint: give --engine torch and --checkpoint DIR together.")
    common: dict[str, Any] = {} if threads is None else {"threads": threads}
    common |= {} if backend == "cpu" else {"backend": backend}
    found = []
    for name in names:
        engine, options = _ENGINES[name]
        if engine == "mnn" and backend != "cpu":
            require_backend(backend)
            how = {"memory": options.get("memory", "normal"), "split": options.get("split", False)}
            places = placement(backend, saved(backend), **how)
            options = {**options, "places": {place.component.value: place.backend for place in places}}
        if engine != "torch":
            bundle_engine(opened, engine, options)
        source, manifest = (checkpoint, None) if engine == "torch" else (bundle, opened.manifest.digest)
        found.append(Contender(name, str(source), engine, {**options, **common}, manifest, engine == "torch"))
    return tuple(found)


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
    device_bytes: int | None = None
    """What that process held of GPUs' memory at most; None where NVML does not tell."""

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
            "device_bytes": self.device_bytes,
        }


def bench(
    contenders: Sequence[Contender],
    durations: Sequence[float],
    *,
    repeats: int = 3,
    steps: int | None = None,
    memory: bool = True,
    report: Callable[[str], None],
) -> list[Row]:
    """Measure every engine at every duration.

    Args:
        contenders: the engines.
        durations: seconds of audio.
        repeats: warm generations per engine and duration.
        steps: of the denoising loop; None is what suits the model.
        memory: also measure peak memory, which takes one more generation of one step each.
        report: called with a line before each measurement.

    Raises:
        UsageError: nothing to measure, or a duration that the model cannot generate; found before the first one.
        Sa3Error: an engine cannot run the models.

    """
    if not contenders or not durations or repeats < 1:
        raise UsageError("Give at least one engine, one duration and one repeat.")
    with contenders[0].open(keep_loaded=False) as pipeline:
        for duration in durations:
            lengths(pipeline.layout, duration)
    rows = []
    for duration in durations:
        runs = _interleaved(contenders, GenerateRequest(PROMPT, seconds=duration, steps=steps), repeats, report)
        for contender, (cold, *warm) in zip(contenders, runs, strict=True):
            name = contender.name
            peaks: Peaks = (None, None)
            if memory:
                report(f"{duration:g} s, {name}, memory")
                peaks = peak_memory(contender, GenerateRequest(PROMPT, seconds=duration, steps=1))
            rows.append(Row(name, duration, "cold", cold, (cold.total,), *peaks))
            rows.append(Row(name, duration, "warm", median_run(warm), tuple(f.total for f in warm), *peaks))
    return rows


def _interleaved(
    contenders: Sequence[Contender], request: GenerateRequest, repeats: int, report: Callable[[str], None]
) -> list[list[Figures]]:
    """Return the runs of each contender, a cold one and then the warm ones; all models stay loaded meanwhile."""
    runs: list[list[Figures]] = [[] for _ in contenders]
    with ExitStack() as stack:
        pipelines = [stack.enter_context(contender.open(keep_loaded=True)) for contender in contenders]
        for turn in range(1 + repeats):
            # Every other turn backwards, so that no engine always follows the same one.
            for i in range(len(contenders))[:: -1 if turn % 2 else 1]:
                which = "cold" if turn == 0 else f"warm {turn} of {repeats}"
                report(f"{request.seconds:g} s, {contenders[i].name}, {which}")
                runs[i].append(measured(pipelines[i], request))
    return runs


def measured(pipeline: Pipeline, request: GenerateRequest) -> Figures:
    """Generate once over a `TimedEngine` and return where the time went; whatever comes out passes."""
    clock = pipeline.models.engine
    assert isinstance(clock, TimedEngine)
    clock.reset()
    pipeline.forget()
    start = time.perf_counter()
    for _ in pipeline.stream(request, allow=CHECKS):
        pass
    total = time.perf_counter() - start
    return Figures(
        load=clock.loading,
        text_encoder=clock.seconds[Component.TEXT_ENCODER],
        number_conditioner=clock.seconds[Component.NUMBER_CONDITIONER],
        dit=clock.seconds[Component.DIT],
        decoder=clock.seconds[Component.DECODER],
        other=total - clock.loading - sum(clock.seconds.values()),
        dit_runs=clock.runs[Component.DIT],
    )


def median_run(runs: Sequence[Figures]) -> Figures:
    """Return the run whose total is the median (the lower one of an even number), so that its parts add up."""
    return sorted(runs, key=lambda figures: figures.total)[(len(runs) - 1) // 2]


def peak_memory(contender: Contender, request: GenerateRequest) -> Peaks:
    """Return the most bytes resident, and held on GPUs, while a new process made one generation as `run` does.

    None where the system does not tell. Raises BackendError with the process's own message if it failed.
    """
    task = {"contender": dataclasses.asdict(contender), "request": request.to_json()}
    command = [sys.executable, "-m", "sa3_convert.lab.bench"]
    result = subprocess.run(
        command, input=json.dumps(task), capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or ["without a word (killed for its memory?)"]
        raise BackendError(f"Measuring the memory of {contender.name} ended with {result.returncode}: {reason[0]}")
    peaks = json.loads(result.stdout)
    return peaks["peak_bytes"], peaks["device_bytes"]


def _main() -> None:
    die_with_parent()
    task = json.load(sys.stdin)
    request = GenerateRequest.from_json(task["request"])
    with machine.PeakMemory() as device, Contender(**task["contender"]).open(keep_loaded=False) as pipeline:
        # Chunks are let go as they come, as when they are written to a file.
        for _ in pipeline.stream(request, allow=CHECKS):
            pass
    sys.stdout.write(json.dumps({"peak_bytes": machine.peak_memory(), "device_bytes": device.bytes}) + "\n")


if __name__ == "__main__":
    _main()
