"""`selftest`: what each engine that is installed here computes, how fast and in how much memory, all measured now.

A checkpoint with seeded weights is made and converted first. What is right is ONNX Runtime in float32 on the CPU, or
torch there where nothing could be converted; and of a toy what the reference implementation gave (`lab.golden`).
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from sa3_convert.arrays import Floats, constant, free, host
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.compare import Outputs, compare_runs, run_samples
from sa3_convert.check.inputs import Sample, samples_for
from sa3_convert.check.metrics import compare
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.checkpoint.variants import Size
from sa3_convert.components import Component
from sa3_convert.convert.conversion import convert
from sa3_convert.convert.plan import ConvertRequest
from sa3_convert.errors import BackendError, VerificationError
from sa3_convert.lab.bench import Contender, Row, bench
from sa3_convert.lab.doctor.examine import diagnose, surroundings
from sa3_convert.lab.doctor.results import Diagnosis
from sa3_convert.lab.golden import OF_PEAK, GoldenFinding, golden_findings, tolerated
from sa3_convert.mnn.compatibility import require_backend
from sa3_convert.passes.half import FLOORS_DB
from sa3_convert.recipe import load_recipe, recipe_file
from sa3_convert.runtime.engines import KINDS, Engine, EngineName
from sa3_convert.runtime.output_checks import CHECKS
from sa3_convert.runtime.placement import onnxruntime_problem, torch_problem
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.system.files import require_space
from sa3_convert.system.machine import default_threads

Device = Literal["cpu", "cuda"]
Say = Callable[[str], None]

_FLOAT_DB: Final = 60.0
"""Of float32 on any device: another sine or order of sums leaves 68 dB of the DiT's phases, halves less than 60."""
_WAY_DB: Final = 40.0
_WAYS_DB: Final[Mapping[str, float]] = {"mnn-int8": 6.0, "onnxruntime-fp16": 20.0, "torch-fp16": 20.0}
"""Of latents after all steps, each of which starts from what the last one left; at 6 dB half the amplitude is right."""
_CANDIDATES: Final[Mapping[str, tuple[EngineName, str, Mapping[str, Any]]]] = {
    "mnn": ("mnn", "fp32", {}),
    "mnn-int8": ("mnn", "int8", {}),
    "onnxruntime": ("onnxruntime", "fp32", {}),
    "onnxruntime-fp16": ("onnxruntime-fp16", "fp32", {}),
    "torch": ("torch", "fp32", {}),
    "torch-fp16": ("torch", "fp32", {"precision": "normal"}),
}
"""By name: engine, recipe of the bundle, further options."""
_GOLDEN: Final = ("mnn", "onnxruntime", "torch")
"""Those that compute in float32, which golden cases are for."""
_DURATIONS: Final = {False: (2.0, 5.0), True: (10.0, 30.0, 60.0, 120.0)}
VARIANT: Final = "small-music"
_BYTES: Final = {False: 200 << 20, True: 21 << 30}
"""Of disk: checkpoint, references, models of three kinds, and what passes (`convert --dry-run` tells its parts)."""
_REQUEST: Final = GenerateRequest("warm analog synth pad", seconds=2.0, seed=0)


@dataclass(frozen=True, slots=True)
class Made:
    """What the engines are tried on."""

    checkpoint: Path
    bundles: Mapping[str, Path]
    """By recipe; none where nothing could be converted."""

    def contender(self, name: str, device: str) -> Contender:
        """Return how a candidate is opened on a device."""
        engine, recipe, options = _CANDIDATES[name]
        source = self.checkpoint if engine == "torch" else self.bundles[recipe]
        return Contender(name, str(source), engine, {"backend": device, **options})

    def reference(self) -> Contender:
        """Return what is right."""
        return self.contender("onnxruntime" if self.bundles else "torch", "cpu")


@dataclass(frozen=True, slots=True)
class Finding:
    """One component of one engine, or the latents of a whole generation, against what is right."""

    engine: str
    what: str
    floor_db: float
    db: float | None = None
    """Signal-to-noise ratio of the worst case; None where it could not be run."""
    again_db: float | None = None
    """The same of second runs with the same arrays, in which what stays the same is not sent or computed again, and of
    which torch on CUDA makes a graph and replays it; None of latents."""
    error: str = ""

    @property
    def worst_db(self) -> float | None:
        """The lower one."""
        return self.db if self.db is None or self.again_db is None else min(self.db, self.again_db)

    @property
    def passes(self) -> bool:
        """Whether both reach the floor."""
        return self.worst_db is not None and self.worst_db >= self.floor_db

    def describe(self) -> str:
        """Return what was found, in a few words."""
        found = self.error if self.worst_db is None else f"{self.worst_db:.1f} dB, less than {self.floor_db:g}"
        return f"{self.engine}, {self.what}: {found}"


LATENTS: Final = "latents"


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Everything that was found."""

    device: str
    full: bool
    surroundings: Mapping[str, Any]
    absent: Mapping[str, str]
    """Engines that cannot run here, and why."""
    findings: tuple[Finding, ...]
    golden: tuple[GoldenFinding, ...]
    rows: tuple[Row, ...]
    diagnosis: Diagnosis | None
    """None where MNN cannot run on the device."""
    seconds: float
    troubles: tuple[str, ...] = ()
    """What else went wrong."""

    def failures(self) -> tuple[str, ...]:
        """Return what is not as it should be, each in a sentence's part."""
        needed = () if self.diagnosis is None else self.diagnosis.results
        probes = tuple(
            f"doctor, {result.probe}: {answer.outcome} at {setting}"
            for result in needed
            for setting, answer in result.answers.items()
            if result.needed_by and setting == _USUAL and answer.outcome in ("wrong", "fails", "unsupported")
        )
        judged: tuple[Finding | GoldenFinding, ...] = (*self.golden, *self.findings)
        return (*(found.describe() for found in judged if not found.passes), *self.troubles, *probes)

    def verdict(self) -> str:
        """Return the verdict, in a sentence."""
        judged: tuple[Finding | GoldenFinding, ...] = (*self.findings, *self.golden)
        engines = tuple(dict.fromkeys(found.engine for found in judged))
        without = f"; not there: {', '.join(self.absent)}" if self.absent else ""
        bad = self.failures()
        word = "passed" if not bad else f"FAILED in {len(bad)} of what was tried"
        return f"Self-test on {self.device} {word}: {', '.join(engines)}{without}."

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "kind": "sa3-convert selftest",
            "passed": not self.failures(),
            "verdict": self.verdict(),
            "failures": self.failures(),
            "device": self.device,
            "variant": VARIANT,
            "size": "full" if self.full else "toy",
            "seconds": self.seconds,
            "surroundings": self.surroundings,
            "absent": self.absent,
            "golden": [asdict(found) | {"limit": OF_PEAK, "passes": found.passes} for found in self.golden],
            "findings": [asdict(finding) | {"passes": finding.passes} for finding in self.findings],
            "rows": [row.to_json() for row in self.rows],
            "diagnosis": None if self.diagnosis is None else self.diagnosis.to_data(),
        }

    def check(self) -> None:
        """Raise VerificationError if something is not as it should be."""
        if bad := self.failures():
            raise VerificationError(f"{self.verdict()} {'. '.join(bad)}.")


_USUAL: Final = "precision high, memory normal"


def told_ahead(device: Device, *, full: bool) -> str:
    """Return what a test will take, in a sentence."""
    room = f"{_BYTES[full] / 2**30:.1f} GiB of {tempfile.gettempdir()} (TMPDIR names another folder)"
    if not full:
        return f"Toys on {device}: about two minutes on two quiet cores, {room}."
    cores = default_threads()
    # Conversions, then generations of 220 seconds of audio, of each engine a cold one, warm ones, and one for memory.
    minutes = 12 + (130 / cores if device == "cpu" else 0)
    return f"True size on {device}: about {minutes:.0f} minutes with {cores} cores, 5 GiB of memory, {room}."


def selftest(device: Device, folder: Path, *, full: bool = False, say: Say) -> SelfTest:
    """Try everything that is installed on a device.

    Args:
        device: where.
        folder: an empty one, for what is made first.
        full: models of true size, and durations of up to two minutes; see `told_ahead`.
        say: called with what is done next.

    Raises:
        BackendError: no engine runs on the device, with the reason of each.
        UsageError: the disk has no room.

    """
    start = time.perf_counter()
    absent = _without_models(device)
    _require_one(device, absent)
    require_space(folder, _BYTES[full], "The test")
    made = _made(folder / "models", "full" if full else "toy", absent, say)
    toys = _made(folder / "toys", "toy", absent, say) if full else made
    present: dict[str, Contender] = {}
    for name in [name for name in _CANDIDATES if name not in absent]:
        contender = made.contender(name, device)
        try:
            free(_opened(contender).load(Component.NUMBER_CONDITIONER))
        except (BackendError, ImportError) as error:
            absent[name] = str(error)
        else:
            present[name] = contender
    _require_one(device, absent)
    troubles: list[str] = []
    golden: list[GoldenFinding] = []
    with tolerated("golden cases", troubles):
        held = [toys.contender(name, device) for name in _GOLDEN if name in present]
        golden = golden_findings(held, Checkpoint.open(toys.checkpoint), say)
    findings = _compared(made, tuple(present.values()), say)
    broken = {finding.engine for finding in findings if finding.db is None}
    timed = [contender for name, contender in present.items() if name not in broken]
    rows: list[Row] = []
    diagnosis: Diagnosis | None = None
    with tolerated("times", troubles):
        rows = bench(timed, _DURATIONS[full], repeats=_repeats(device, full), report=say) if timed else []
    with tolerated("doctor", troubles):
        diagnosis = _diagnosed(device, say)
    return SelfTest(
        device=device,
        full=full,
        surroundings=surroundings(),
        absent=absent,
        findings=tuple(findings),
        golden=tuple(golden),
        rows=tuple(rows),
        diagnosis=diagnosis,
        seconds=time.perf_counter() - start,
        troubles=tuple(troubles),
    )


def _repeats(device: Device, full: bool) -> int:
    """Return how many warm generations are timed; of true size one takes minutes on a CPU."""
    return 2 if not full else 1 if device == "cpu" else 3


def _without_models(device: Device) -> dict[str, str]:
    """Return engines that cannot run on a device whatever the model is, and why."""
    problems: dict[str, str | None] = {}
    if device == "cuda":
        problems = {"onnxruntime": onnxruntime_problem(), "torch": torch_problem()}
    try:
        require_backend(device)
    except BackendError as error:
        problems["mnn"] = str(error)
    reasons = {name: problems.get(row[0].partition("-")[0]) for name, row in _CANDIDATES.items()}
    return {name: why for name, why in reasons.items() if why is not None}


def _require_one(device: Device, absent: Mapping[str, str]) -> None:
    if absent.keys() >= _CANDIDATES.keys():
        raise BackendError(f"No engine runs on {device}. " + " ".join(dict.fromkeys(absent.values())))


def _made(folder: Path, size: Size, absent: dict[str, str], say: Say) -> Made:
    """Make a checkpoint and convert it for the engines that are not absent; those with nothing to run become so."""
    say(f"a checkpoint of {size} size with seeded weights")
    folder.mkdir()
    checkpoint = folder / "checkpoint"
    synthesize(checkpoint, VARIANT, size, 0, "gaussian")
    needed = {name: row[1] for name, row in _CANDIDATES.items() if row[0] != "torch" and name not in absent}
    bundles = {}
    try:
        for recipe in dict.fromkeys(needed.values()):
            request = ConvertRequest(
                checkpoint=Checkpoint.open(checkpoint),
                recipe=load_recipe(recipe_file(Path(f"configs/{recipe}.yaml"))),
                out=folder / recipe,
                cache=folder / "cache",
                with_onnx="fp16" if recipe == "fp32" else None,
            )
            convert(request, lambda event: say(f"converting: {event.component.value}, {event.stage} {event.state}"))
            bundles[recipe] = request.out
    except (BackendError, ImportError) as error:
        absent.update(dict.fromkeys(needed, f"nothing could be converted: {error}"))
        return Made(checkpoint, {})
    return Made(checkpoint, bundles)


def _opened(contender: Contender) -> Engine:
    return contender.open(keep_loaded=False).models.engine


def _compared(made: Made, contenders: Sequence[Contender], say: Say) -> list[Finding]:
    right = made.reference()
    others = [contender for contender in contenders if contender != replace(right, name=contender.name)]
    layout = Checkpoint.open(made.checkpoint).layout
    findings = []
    for component in Component:
        samples = samples_for(component, layout, quick=True)
        say(f"{component.value}, {right.name} on the CPU")
        expected = _outputs(right, component, samples)[::2]

        def ratio(contender: Contender) -> tuple[float, float]:
            actual = _outputs(contender, component, samples)  # noqa: B023 - called within the turn
            first, again = (
                compare_runs(component, layout, samples, expected, actual[turn::2]).worst.signal_to_noise_db  # noqa: B023
                for turn in range(2)
            )
            return first, again

        for contender in others:
            say(f"{component.value}, {contender.name}")
            findings.append(_found(contender, component.value, _floor_db(contender, component), ratio))
    latents = _latents(right)
    for contender in others:
        say(f"a generation, {contender.name}")
        floor = _WAYS_DB.get(contender.name, _WAY_DB)
        findings.append(
            _found(contender, LATENTS, floor, lambda c: (compare(latents, _latents(c)).signal_to_noise_db, None))
        )
    return findings


def _outputs(contender: Contender, component: Component, samples: Sequence[Sample]) -> list[Outputs]:
    """Return what the samples give, each of them twice in a row; see `Finding.again_db`."""
    session = _opened(contender).load(component)
    try:
        outputs = []
        for sample in samples:
            kept = replace(sample, feeds={name: constant(array) for name, array in sample.feeds.items()})
            outputs += run_samples(session, (kept, kept))
        return [{name: host(array) for name, array in output.items()} for output in outputs]
    finally:
        free(session)


def _found(
    contender: Contender, what: str, floor_db: float, ratio: Callable[[Contender], tuple[float, float | None]]
) -> Finding:
    troubles: list[str] = []
    with tolerated("error", troubles):
        return Finding(contender.name, what, floor_db, *ratio(contender))
    return Finding(contender.name, what, floor_db, error=troubles[0])


def _floor_db(contender: Contender, component: Component) -> float:
    """Return what is asked: what the bundle asks of a model, and no more than of float32."""
    if contender.engine == "torch":
        return FLOORS_DB[component] if contender.name == "torch-fp16" else _FLOAT_DB
    claimed = Bundle.open(Path(contender.source)).artifact(component, KINDS[contender.engine]).floor_db
    return _FLOAT_DB if claimed is None else min(_FLOAT_DB, claimed)


def _latents(contender: Contender) -> Floats:
    with contender.open(keep_loaded=False) as pipeline:
        report = pipeline.generate(_REQUEST, allow=CHECKS).report
    return host(report.latents)[..., : report.lengths.valid]


def _diagnosed(device: Device, say: Say) -> Diagnosis | None:
    try:
        require_backend(device)
    except BackendError:
        return None
    return diagnose(device, lambda done, total: say(f"probe {done} of {total}") if done % 10 == 0 else None)
