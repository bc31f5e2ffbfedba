"""From prompt to audio on both sides, beside what chance alone does.

Generation amplifies small differences, so no figure means anything by itself. The chaos floor gives it a scale: the
reference against itself, with the noise that it draws nudged by a thousandth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sa3_convert.errors import VerificationError
from sa3_convert.runtime.conditioning import conditioning
from sa3_convert.verify.audio_metrics import AudioFidelity, compare_audio
from sa3_convert.verify.generation import GenerationCase
from sa3_convert.verify.metrics import compare
from sa3_convert.verify.sides import References, Side

NUDGE = 1e-3
"""Standard deviation of what is added to each draw of noise, whose own is 1."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far one generation went from the reference's."""

    latent_cosine: float
    audio: AudioFidelity


@dataclass(frozen=True, slots=True)
class EndToEndCase:
    """One generation."""

    case: str
    target: Divergence
    chaos: Divergence


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """All generations; there is at least one."""

    cases: tuple[EndToEndCase, ...]

    @property
    def chaos_ratio(self) -> float:
        """Mean spectral distance of the target over that of the nudged reference."""
        chaos = math.fsum(c.chaos.audio.mean_spectral_distance_db for c in self.cases)
        target = math.fsum(c.target.audio.mean_spectral_distance_db for c in self.cases)
        return target / max(chaos, 1e-9)

    def judgement(self) -> str:
        """Say in words what the figures amount to."""
        count, ratio = len(self.cases), self.chaos_ratio
        target = math.fsum(c.target.audio.mean_spectral_distance_db for c in self.cases) / count
        chaos = math.fsum(c.chaos.audio.mean_spectral_distance_db for c in self.cases) / count
        figures = f"Over {count} generations the target's spectra are {target:.2f} dB from the reference's"
        nudge = f"the reference itself, its noise nudged by {NUDGE:g}, {chaos:.2f} dB"
        if ratio <= 1:
            return f"{figures}; {nudge}. The conversion changes less than such a nudge does."
        return f"{figures}; {nudge}. The conversion changes {ratio:.1f} times as much as such a nudge does."

    def to_data(self) -> dict[str, Any]:
        """Return JSON-ready data: judgement, ratio to chance, every case."""
        return {
            "nudge": NUDGE,
            "chaos_ratio": self.chaos_ratio,
            "judgement": self.judgement(),
            "cases": [asdict(case) for case in self.cases],
        }


def generate_both(
    references: References,
    target: Side,
    cases: Sequence[GenerationCase],
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> EndToEnd:
    """Generate every case on the reference, on the nudged reference and on the target.

    One model is in memory at a time: each stage is done for all cases before the next.

    Args:
        references: of the same bundle.
        target: runs the `.mnn` models.
        cases: what to generate.
        report: (what is being done, cases done, cases in all).

    Raises:
        VerificationError: there are no cases, or what comes out cannot be compared.
        BundleError: a model is not in the bundle.

    """
    if not cases:
        raise VerificationError("There are no cases to generate.")
    for nudge, name in ((0.0, "reference"), (NUDGE, "nudged reference")):
        for stage in (references.trajectory, references.audio):
            for done, case in enumerate(cases):
                report(name, done, len(cases))
                stage(case, nudge=nudge)
    references.side.close()
    report("target", 0, len(cases))
    prompts = {case.text: target.prompt_embedding(case) for case in cases}
    seconds = {case.seconds: target.seconds_embedding(case) for case in cases}
    latents = []
    for done, case in enumerate(cases):
        report("target", done, len(cases))
        condition = conditioning(prompts[case.text], seconds[case.seconds])
        latents.append(target.trajectory(case, condition, steps=references.steps).result)
    results = []
    for case, final in zip(cases, latents, strict=True):
        path, nudged = references.trajectory(case), references.trajectory(case, nudge=NUDGE)
        expected = references.audio(case)
        audio = target.audio(case, final), references.audio(case, nudge=NUDGE)
        divergences = [
            Divergence(
                compare(
                    path.result[..., : path.valid], values[..., : path.valid], what=f"latents ({case.name})"
                ).cosine,
                compare_audio(expected[0], heard[0], target.layout.sample_rate),
            )
            for values, heard in zip((final, nudged.result), audio, strict=True)
        ]
        results.append(EndToEndCase(case.name, *divergences))
    target.close()
    return EndToEnd(tuple(results))
