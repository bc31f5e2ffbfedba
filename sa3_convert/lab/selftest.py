"""`selftest`: what each engine that is installed here computes, how fast and in how much memory, all measured now.

Nothing is shipped for it: a checkpoint with seeded weights is made and converted first. What is right is ONNX Runtime
in float32 on the CPU, or torch there where nothing could be converted.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from sa3_convert.components import Component
from sa3_convert.convert.conversion import convert
from sa3_convert.convert.plan import ConvertRequest
from sa3_convert.errors import BackendError, Sa3Error, VerificationError
from sa3_convert.lab.bench import Contender, Row, bench
from sa3_convert.lab.doctor.examine import diagnose, surroundings
from sa3_convert.lab.doctor.results import Diagnosis
from sa3_convert.mnn.compatibility import require_backend
from sa3_convert.passes.half import FLOORS_DB
from sa3_convert.recipe import load_recipe, recipe_file
from sa3_convert.runtime.engines import KINDS, Engine, EngineName
from sa3_convert.runtime.output_checks import CHECKS
from sa3_convert.runtime.request import GenerateRequest

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
_DURATIONS: Final = {False: (2.0, 5.0), True: (10.0, 30.0, 60.0, 120.0)}
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
    error: str = ""

    @property
    def passes(self) -> bool:
        """Whether it reaches its floor."""
        return self.db is not None and self.db >= self.floor_db

    def describe(self) -> str:
        """Return what was found, in a few words."""
        found = self.error if self.db is None else f"{self.db:.1f} dB, less than {self.floor_db:g}"
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
        return (*(f.describe() for f in self.findings if not f.passes), *self.troubles, *probes)

    def verdict(self) -> str:
        """Return the verdict, in a sentence."""
        engines = tuple(dict.fromkeys(finding.engine for finding in self.findings))
        without = f"; not there: {', '.join(self.absent)}" if self.absent else ""
        bad = self.failures()
        word = "passed" if not bad else f"FAILED in {len(bad)} of what was tried"
        return f"Self-test on {self.device} {word}: {', '.join(engines)}{without}."

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "verdict": self.verdict(),
            "failures": self.failures(),
            "device": self.device,
            "full": self.full,
            "seconds": self.seconds,
            "surroundings": self.surroundings,
            "absent": self.absent,
            "findings": [asdict(finding) | {"passes": finding.passes} for finding in self.findings],
            "rows": [row.to_json() for row in self.rows],
            "diagnosis": None if self.diagnosis is None else self.diagnosis.to_data(),
        }

    def check(self) -> None:
        """Raise VerificationError if something is not as it should be."""
        if bad := self.failures():
            raise VerificationError(f"{self.verdict()} {'. '.join(bad)}.")


_USUAL: Final = "precision high, memory normal"


def selftest(device: Device, folder: Path, *, full: bool = False, say: Say) -> SelfTest:
    """Try everything that is installed on a device.

    Args:
        device: where.
        folder: an empty one, for what is made first.
        full: models of true size, and durations of up to two minutes: tens of minutes, and 16 GB of disk.
        say: called with what is done next.

    Raises:
        BackendError: no engine runs on the device, with the reason of each.

    """
    start = time.perf_counter()
    made, absent = _made(folder, full, say)
    present: dict[str, Contender] = {}
    for name in [name for name in _CANDIDATES if name not in absent]:
        contender = made.contender(name, device)
        try:
            free(_opened(contender).load(Component.NUMBER_CONDITIONER))
        except (BackendError, ImportError) as error:
            absent[name] = str(error)
        else:
            present[name] = contender
    if not present:
        raise BackendError(f"No engine runs on {device}. " + " ".join(dict.fromkeys(absent.values())))
    findings = _compared(made, tuple(present.values()), say)
    broken = {finding.engine for finding in findings if finding.db is None}
    timed = [contender for name, contender in present.items() if name not in broken]
    rows: list[Row] = []
    diagnosis: Diagnosis | None = None
    troubles: list[str] = []
    with _told("times", troubles):
        rows = bench(timed, _DURATIONS[full], repeats=3 if full else 2, report=say) if timed else []
    with _told("doctor", troubles):
        diagnosis = _diagnosed(device, say)
    return SelfTest(
        device=device,
        full=full,
        surroundings=surroundings(),
        absent=absent,
        findings=tuple(findings),
        rows=tuple(rows),
        diagnosis=diagnosis,
        seconds=time.perf_counter() - start,
        troubles=tuple(troubles),
    )


@contextlib.contextmanager
def _told(what: str, troubles: list[str]) -> Iterator[None]:
    """Let a test go on after what goes wrong in the block; libraries of GPUs have errors of their own kinds."""
    try:
        yield
    except Exception as error:
        troubles.append(f"{what}: {error if isinstance(error, Sa3Error) else repr(error)}")


def _made(folder: Path, full: bool, say: Say) -> tuple[Made, dict[str, str]]:
    """Make a checkpoint and convert it; return which engines have nothing to run, and why."""
    size: Literal["full", "toy"] = "full" if full else "toy"
    say(f"a checkpoint of {size} size with seeded weights")
    checkpoint = folder / "checkpoint"
    synthesize(checkpoint, "small-music", size, 0, "gaussian")
    bundles = {}
    try:
        for recipe in dict.fromkeys(recipe for engine, recipe, _ in _CANDIDATES.values() if engine != "torch"):
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
        why = f"nothing could be converted: {error}"
        return Made(checkpoint, {}), {name: why for name, row in _CANDIDATES.items() if row[0] != "torch"}
    return Made(checkpoint, bundles), {}


def _opened(contender: Contender) -> Engine:
    return contender.open(keep_loaded=False).models.engine


def _compared(made: Made, contenders: Sequence[Contender], say: Say) -> list[Finding]:
    right = made.reference()
    others = [contender for contender in contenders if contender != replace(right, name=contender.name)]
    layout = Checkpoint.open(made.checkpoint).layout
    findings = []
    for component in Component:
        # Twice each: torch records on CUDA what stays the same, and replays a graph the second time.
        samples = [sample for sample in samples_for(component, layout, quick=True) for _ in range(2)]
        say(f"{component.value}, {right.name} on the CPU")
        expected = _outputs(right, component, samples)

        def ratio(contender: Contender) -> float:
            actual = _outputs(contender, component, samples)  # noqa: B023 - called within the turn
            return compare_runs(component, layout, samples, expected, actual).worst.signal_to_noise_db  # noqa: B023

        for contender in others:
            say(f"{component.value}, {contender.name}")
            findings.append(_found(contender, component.value, _floor_db(contender, component), ratio))
    latents = _latents(right)
    for contender in others:
        say(f"a generation, {contender.name}")
        floor = _WAYS_DB.get(contender.name, _WAY_DB)
        findings.append(_found(contender, LATENTS, floor, lambda c: compare(latents, _latents(c)).signal_to_noise_db))
    return findings


def _outputs(contender: Contender, component: Component, samples: Sequence[Sample]) -> list[Outputs]:
    session = _opened(contender).load(component)
    kept: dict[str, Sample] = {}
    for sample in samples:
        kept.setdefault(sample.name, replace(sample, feeds={n: constant(array) for n, array in sample.feeds.items()}))
    try:
        outputs = run_samples(session, [kept[sample.name] for sample in samples])
        return [{name: host(array) for name, array in output.items()} for output in outputs]
    finally:
        free(session)


def _found(contender: Contender, what: str, floor_db: float, ratio: Callable[[Contender], float]) -> Finding:
    troubles: list[str] = []
    with _told("error", troubles):
        return Finding(contender.name, what, floor_db, ratio(contender))
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
