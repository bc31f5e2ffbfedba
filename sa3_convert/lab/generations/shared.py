"""A full verification as tasks for workers: models on sampled inputs, references, observations, whole generations.

References lie in the store that all workers see, and are what an interrupted verification leaves. What a task raises
ends the verification: one that lacks a case is none.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from sa3_convert.arrays import Floats
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.bundle import verify_bundle
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.check.results import BundleFidelity, Progress, reference_stage, sampled_stage
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, Sa3Error, VerificationError
from sa3_convert.lab.generations.distribution import QUANTITIES, Distribution, GenerationFidelity, reference_of
from sa3_convert.lab.generations.end_to_end import TARGET, EndToEnd, EndToEndCase, Heard, compared, staged_pipelines
from sa3_convert.lab.generations.trajectory import GenerationCase, StagedPipeline, end_to_end_cases
from sa3_convert.runtime.engines import EngineName
from sa3_convert.scheduling import BESIDE_WEIGHTS, Estimate, Latest, Runner

AUDIBLE: Final = {Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER, Component.DIT, Component.DECODER}
"""What generations end to end need."""
Measured = tuple[BundleFidelity, GenerationFidelity, EndToEnd | None]
"""What `verify_bundle`, `measure_components` and, of all that is audible, `measure_end_to_end` find."""


@dataclass(frozen=True, slots=True)
class Staged:
    """What a worker opens, and holds from task to task."""

    bundle: Path
    hashes: tuple[str, ...]
    """Of the bundle's files, which a worker's bundle must have."""
    engine: EngineName
    steps: int
    quick: bool
    threads: int | None
    references: Path
    """Where reference outputs are kept; all workers see it."""
    limit: int
    """Bytes that it may have."""

    @classmethod
    def of(cls, bundle: Bundle, store: ReferenceStore, **how: Any) -> "Staged":
        """Describe an open bundle."""
        place: dict[str, Any] = {"references": store.folder.absolute(), "limit": store.limit}
        return cls(bundle.path.absolute(), hashes_of(bundle), **place, **how)


def hashes_of(bundle: Bundle) -> tuple[str, ...]:
    """Return the hashes of a bundle's files, in the order of its manifest."""
    return tuple(entry.sha256 for artifact in bundle.manifest.artifacts for entry in artifact.files)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a verification."""

    what: Literal["sampled", "reference", "observed", "end to end"]
    stage: str
    """As it is reported; of a quantity its name."""
    component: Component
    case: GenerationCase | None
    takes: Estimate
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Stage and case."""
        return f"{self.stage}, {self.case.name}" if self.case else self.stage


def on_workers(
    runner: Runner,
    bundle: Bundle,
    wanted: Sequence[Component],
    cases: Sequence[GenerationCase],
    *,
    store: ReferenceStore,
    report: Progress,
    heard: Heard,
    **how: Any,
) -> Measured:
    """Return what workers find, and hand on what they heard; `how` is the rest of a `Staged`."""
    if not cases:
        raise VerificationError("There are no cases to generate.")
    staged = Staged.of(bundle, store, **how)
    stages: dict[str, list[Part]] = {}
    for part in _parts(bundle, wanted, cases, staged.steps):
        stages.setdefault(part.stage, []).append(part)
    found = _found(runner, staged, stages, report)
    sampled: list[BundleFidelity] = [found[part] for own in stages.values() for part in own if part.what == "sampled"]
    verdicts, adapted = (tuple(v for one in sampled for v in getattr(one, name)) for name in ("verdicts", "adapted"))
    fidelity = BundleFidelity(sampled[0].bundle, sampled[0].recipe, verdicts, adapted=adapted)
    distributions = (
        Distribution(q.name, [o for part in stages[q.name] for o in found[part]])
        for q in QUANTITIES
        if q.component in wanted
    )
    generations = GenerationFidelity(staged.steps, tuple(distributions))
    results: list[EndToEndCase] = []
    for part in stages.get(TARGET, ()):
        result, audio = found[part]
        results.append(result)
        for side, samples in audio.items():
            heard(GenerationCase.parse(result.case), side, samples)
    return fidelity, generations, EndToEnd(tuple(results)) if results else None


def _found(runner: Runner, staged: Staged, stages: Mapping[str, Sequence[Part]], report: Progress) -> dict[Part, Any]:
    """Return what came of each part; stages are told in their order, whichever part comes first."""
    found: dict[Part, Any] = {}
    with contextlib.closing(runner([part for own in stages.values() for part in own], _Run(staged))) as outcomes:
        for stage, own in stages.items():
            # Also told of is a stage that was done while others were.
            report(stage, 0, len(own))
            while (done := sum(part in found for part in own)) < len(own):
                report(stage, done, len(own))
                part, outcome = next(outcomes)
                if isinstance(outcome, Sa3Error):
                    raise outcome
                found[part] = outcome
    return found


def _parts(bundle: Bundle, wanted: Sequence[Component], cases: Sequence[GenerationCase], steps: int) -> list[Part]:
    """Return all parts in an order in which each follows what it needs."""
    memory = _memory(bundle)
    parts = [Part("sampled", sampled_stage(one, "mnn"), one, None, _taken(memory, 10, 60)) for one in wanted]
    chain = list(Component)[: max(list(Component).index(one) for one in wanted) + 1]
    for before, one in zip([None, *chain], chain, strict=False):
        for case in cases:
            needs = () if before is None else (f"{reference_stage(before)}, {case.name}",)
            taken = _taken(memory, steps, case.seconds)
            parts.append(Part("reference", reference_stage(one), one, case, taken, needs))
    for quantity in (q for q in QUANTITIES if q.component in wanted):
        for case in quantity.distinct(cases):
            needs = (f"{reference_stage(quantity.component)}, {case.name}",)
            taken = _taken(memory, steps, case.seconds)
            parts.append(Part("observed", quantity.name, quantity.component, case, taken, needs))
    if set(wanted) >= AUDIBLE:
        for case in end_to_end_cases(cases):
            needs = (f"{reference_stage(Component.DECODER)}, {case.name}",)
            taken = _taken(memory, 3 * steps, case.seconds)
            parts.append(Part("end to end", TARGET, Component.DECODER, case, taken, needs))
    return parts


def _taken(memory: int, steps: int, seconds: float) -> Estimate:
    """Return what a part takes at the most, on two cores: 0.1 s a step, second of audio and GiB."""
    return Estimate(0.1 * (memory / 2**30) * steps * seconds, memory)


def _memory(bundle: Bundle) -> int:
    """Return the bytes that a part takes at the most: the largest model on both sides, as stored and unpacked."""
    artifacts = bundle.manifest.artifacts
    largest = max(sum(a.total_bytes for a in artifacts if a.component is one) for one in bundle.components)
    return BESIDE_WEIGHTS + 3 * largest


@dataclass(frozen=True, slots=True)
class _Run:
    """Does parts where it is called."""

    staged: Staged

    def __call__(self, part: Part, *_: Any) -> Any:
        bundle, store, references, target = _opened(self.staged)
        if part.what == "sampled":
            how: dict[str, Any] = {"quick": self.staged.quick, "threads": self.staged.threads}
            return verify_bundle(bundle, components=(part.component,), store=store, **how)
        assert part.case is not None
        if part.what == "reference":
            reference_of(references, part.component)(part.case)
            return None
        if part.what == "observed":
            quantity = next(q for q in QUANTITIES if q.name == part.stage)
            return tuple(quantity.observe(references, target, part.case))
        audio: dict[str, Floats] = {}
        result = compared(references, target, part.case, lambda case, side, samples: audio.update({side: samples}))
        return result, audio


_Open = tuple[Bundle, ReferenceStore, StagedPipeline, StagedPipeline]
_held = Latest[Staged, _Open]()


def _opened(staged: Staged) -> _Open:
    def open_it(stack: contextlib.ExitStack) -> _Open:
        bundle = Bundle.open(staged.bundle)
        if hashes_of(bundle) != staged.hashes:
            raise BundleError(f"On this worker, {staged.bundle} is another bundle than where the command was given.")
        store = ReferenceStore(staged.references, staged.limit)
        how: dict[str, Any] = {"engine": staged.engine, "steps": staged.steps, "threads": staged.threads}
        return bundle, store, *stack.enter_context(staged_pipelines(bundle, store=store, **how))

    return _held.of(staged, open_it)
