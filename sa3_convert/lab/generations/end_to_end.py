"""From prompt to audio on both sides, beside what chance alone does."""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass

from sa3_convert.arrays import Floats
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.metrics import compare
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.check.results import FINITE, Progress, derived
from sa3_convert.components import Component
from sa3_convert.convert.cache import cache_beside
from sa3_convert.errors import VerificationError
from sa3_convert.lab.generations.audio_metrics import WINDOWS, AudioFidelity, compare_audio
from sa3_convert.lab.generations.cases import STEPS, GenerationCase
from sa3_convert.lab.generations.trajectory import Memory, StagedPipeline
from sa3_convert.runtime.engines import EngineName, bundle_engine
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.system.files import partial_folder


@contextlib.contextmanager
def staged_pipelines(
    bundle: Bundle,
    *,
    engine: EngineName = "mnn",
    store: ReferenceStore | None = None,
    steps: int = STEPS,
    threads: int | None = None,
) -> Iterator[tuple[StagedPipeline, StagedPipeline]]:
    """Open a bundle's reference models and those that are judged, its files checked against its manifest first.

    `engine` runs the models that are judged; reference outputs are kept in `store`, or until the block ends.
    """
    for component in (Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER, Component.DIT):
        bundle.artifact(component)
    with contextlib.ExitStack() as stack:
        reference, target = (
            stack.enter_context(
                Pipeline.of(bundle, bundle_engine(bundle, name, {"threads": threads}), keep_loaded="last")
            )
            for name in ("onnxruntime", engine)
        )
        if store is None:
            place = Path(tempfile.gettempdir()) / "sa3-references"
            store = ReferenceStore(stack.enter_context(partial_folder(place)))
        yield StagedPipeline(bundle, reference, steps, store), StagedPipeline(bundle, target, steps, Memory())


def default_references(bundle: Bundle) -> Path:
    """Return where a bundle's reference outputs are kept: in the folder of stages that `convert` keeps beside it."""
    return cache_beside(bundle.path) / "references"


Heard = Callable[[GenerationCase, str, Floats], None]
"""(case, "reference", "target" or "chaos", audio [channels, samples])"""

REFERENCE, CHAOS = "end to end, reference", "end to end, nudged reference"
TARGET, TARGET_AUDIO = "end to end, target", "end to end, target's audio"
"""Stages, as they are reported."""

NUDGE = 1e-3
"""Standard deviation of what is added to each draw of noise, whose own is 1."""


@dataclass(frozen=True, config=FINITE)
class Divergence:
    """How far one generation went from the reference's."""

    latent_cosine: float
    audio: AudioFidelity


@dataclass(frozen=True, config=FINITE)
class EndToEndCase:
    """One generation from prompt to audio."""

    case: str
    target: Divergence
    chaos: Divergence
    """The reference itself, its noise nudged."""

    @derived
    def prompt(self) -> str:
        """The prompt's text."""
        return GenerationCase.parse(self.case).text


@dataclass(frozen=True, config=FINITE)
class EndToEnd:
    """From prompt to audio, beside the chaos floor; there is at least one generation."""

    cases: tuple[EndToEndCase, ...]
    nudge: float = NUDGE
    """Standard deviation of what is added to each draw of noise, whose own is 1."""
    windows: tuple[int, ...] = WINDOWS
    """Samples per frame of the spectra."""

    @derived
    def chaos_ratio(self) -> float:
        """Mean spectral distance of the target over that of the nudged reference."""
        return _spectra([c.target for c in self.cases]) / max(_spectra([c.chaos for c in self.cases]), 1e-9)

    @derived
    def judgement(self) -> str:
        """What the figures amount to, in words."""
        ratio = self.chaos_ratio
        over = "In the one generation" if len(self.cases) == 1 else f"Over {len(self.cases)} generations"
        target, chaos = [case.target for case in self.cases], [case.chaos for case in self.cases]
        figures = (
            f"{over} the target's spectra are {_spectra(target):.2f} dB from the reference's (cosine of the latents "
            f"{_cosine(target):z.5f}); the reference itself, its noise nudged by {self.nudge:g}, {_spectra(chaos):.2f} "
            f"dB ({_cosine(chaos):z.5f})."
        )
        if ratio <= 1:
            return f"{figures} The conversion changes less than such a nudge does: chance alone does as much."
        return f"{figures} The conversion changes {ratio:.1f} times as much as such a nudge does."


def _spectra(divergences: Sequence[Divergence]) -> float:
    return math.fsum(d.audio.mean_spectral_distance_db for d in divergences) / len(divergences)


def _cosine(divergences: Sequence[Divergence]) -> float:
    return math.fsum(d.latent_cosine for d in divergences) / len(divergences)


def measure_end_to_end(
    references: StagedPipeline,
    target: StagedPipeline,
    cases: Sequence[GenerationCase],
    report: Progress = lambda what, done, total: None,
    heard: Heard = lambda case, side, audio: None,
) -> EndToEnd:
    """Generate every case on the reference, on the nudged reference and on the target.

    One model is in memory at a time: each stage is done for all cases before the next. Raises VerificationError if
    there are no cases, or if what comes out cannot be compared.
    """
    if not cases:
        raise VerificationError("There are no cases to generate.")
    for nudge, name in ((0.0, REFERENCE), (NUDGE, CHAOS)):
        for stage in (references.trajectory, references.audio):
            for done, case in enumerate(cases):
                report(name, done, len(cases))
                stage(case, nudge=nudge)
    references.close()
    target.embed(cases)
    for done, case in enumerate(cases):
        report(TARGET, done, len(cases))
        target.trajectory(case)
    results = []
    for done, case in enumerate(cases):
        report(TARGET_AUDIO, done, len(cases))
        results.append(_compared(references, target, case, heard))
    target.close()
    return EndToEnd(tuple(results))


def _compared(references: StagedPipeline, target: StagedPipeline, case: GenerationCase, heard: Heard) -> EndToEndCase:
    sides = {"reference": (references, 0.0), "target": (target, 0.0), "chaos": (references, NUDGE)}
    paths = {side: pipeline.trajectory(case, nudge=nudge) for side, (pipeline, nudge) in sides.items()}
    audio = {side: pipeline.audio(case, nudge=nudge)[0] for side, (pipeline, nudge) in sides.items()}
    for side, samples in audio.items():
        heard(case, side, samples)
    expected = paths["reference"]

    def divergence(side: str) -> Divergence:
        valid, what = slice(expected.valid), f"latents ({case.name}, {side})"
        cosine = compare(expected.result[..., valid], paths[side].result[..., valid], what=what).cosine
        rate = target.pipeline.layout.sample_rate
        return Divergence(cosine, compare_audio(audio["reference"], audio[side], rate))

    return EndToEndCase(case.name, divergence("target"), divergence("chaos"))
