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
from sa3_convert.check.progress import Progress
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.check.results import FINITE, derived
from sa3_convert.components import Component
from sa3_convert.convert.cache import cache_beside
from sa3_convert.errors import BundleError, VerificationError
from sa3_convert.lab.generations.audio_metrics import WINDOWS, AudioFidelity, compare_audio
from sa3_convert.lab.generations.trajectory import PROMPTS, GenerationCase, References, Side, Target, all_cases
from sa3_convert.runtime.engines import EngineName
from sa3_convert.runtime.opening import bundle_engine
from sa3_convert.system.files import partial_folder

STEPS = 8
SEEDS = (0, 1)
DURATIONS = (2.0, 5.0, 10.0)
FULL_CASES: tuple[GenerationCase, ...] = all_cases(range(len(PROMPTS)), SEEDS, DURATIONS)
"""What a full verification generates."""
_END_TO_END_PROMPTS = (0, 1, 2, 6)
"""A sound, a piece of music, an effect, and a prompt that is not English."""


def end_to_end_cases(cases: Sequence[GenerationCase]) -> tuple[GenerationCase, ...]:
    """Return those of the cases that are decoded on both sides and beside the chaos floor.

    Of each of four prompts (of the first one, if there are other prompts only) the case of middle duration with the
    first seed.
    """
    prompts = [p for p in _END_TO_END_PROMPTS if any(case.prompt == p for case in cases)] or [cases[0].prompt]
    chosen = []
    for prompt in prompts:
        durations = sorted({case.seconds for case in cases if case.prompt == prompt})
        middle = durations[len(durations) // 2]
        chosen.append(next(case for case in cases if (case.prompt, case.seconds) == (prompt, middle)))
    return tuple(chosen)


@contextlib.contextmanager
def both_sides(
    bundle: Bundle,
    *,
    engine: EngineName = "mnn",
    store: ReferenceStore | None = None,
    steps: int = STEPS,
    threads: int | None = None,
) -> Iterator[tuple[References, Target]]:
    """Open a bundle's references and its target.

    Args:
        bundle: its files are checked against its manifest first.
        engine: what runs the target.
        store: where reference outputs are kept for the next time; None keeps them until the block ends.
        steps: of the denoising loop.
        threads: of either engine; None leaves it to them.

    Raises:
        BundleError: a file is not what the manifest says, or the bundle cannot generate.

    """
    for component in (Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER, Component.DIT):
        bundle.artifact(component)
    if bundle.layout.objective is None:
        raise BundleError(f"Bundle {bundle.path} holds an autoencoder alone; it cannot generate.")
    reference = Side(bundle, bundle_engine(bundle, "onnxruntime", {"threads": threads}))
    target = Side(bundle, bundle_engine(bundle, engine, {"threads": threads}))
    with contextlib.ExitStack() as stack:
        if store is None:
            place = Path(tempfile.gettempdir()) / "sa3-references"
            store = ReferenceStore(stack.enter_context(partial_folder(place)))
        try:
            yield References(reference, store, steps), Target(target, steps)
        finally:
            reference.close()
            target.close()


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


def generate_both(
    references: References,
    target: Target,
    cases: Sequence[GenerationCase],
    report: Progress = lambda what, done, total: None,
    heard: Heard = lambda case, side, audio: None,
) -> EndToEnd:
    """Generate every case on the reference, on the nudged reference and on the target.

    One model is in memory at a time: each stage is done for all cases before the next.

    Args:
        references: of the same bundle.
        target: runs the `.mnn` models.
        cases: what to generate.
        report: called as work goes on.
        heard: called with what was generated.

    Raises:
        VerificationError: there are no cases, or what comes out cannot be compared.
        BundleError: a model is not in the bundle.

    """
    if not cases:
        raise VerificationError("There are no cases to generate.")
    for nudge, name in ((0.0, REFERENCE), (NUDGE, CHAOS)):
        for stage in (references.trajectory, references.audio):
            for done, case in enumerate(cases):
                report(name, done, len(cases))
                stage(case, nudge=nudge)
    references.side.close()
    target.embed(cases)
    for done, case in enumerate(cases):
        report(TARGET, done, len(cases))
        target.latents(case)
    results = []
    for done, case in enumerate(cases):
        report(TARGET_AUDIO, done, len(cases))
        results.append(_compared(references, target, case, heard))
    target.side.close()
    return EndToEnd(tuple(results))


def _compared(references: References, target: Target, case: GenerationCase, heard: Heard) -> EndToEndCase:
    path, nudged = references.trajectory(case), references.trajectory(case, nudge=NUDGE)
    final = target.latents(case)[-1]
    audio = {
        "reference": references.audio(case)[0],
        "target": target.side.audio(case, final)[0],
        "chaos": references.audio(case, nudge=NUDGE)[0],
    }
    for side, samples in audio.items():
        heard(case, side, samples)

    def divergence(side: str, latents: Floats) -> Divergence:
        valid, what = slice(path.valid), f"latents ({case.name}, {side})"
        cosine = compare(path.result[..., valid], latents[..., valid], what=what).cosine
        return Divergence(cosine, compare_audio(audio["reference"], audio[side], target.side.layout.sample_rate))

    return EndToEndCase(case.name, divergence("target", final), divergence("chaos", nudged.result))
