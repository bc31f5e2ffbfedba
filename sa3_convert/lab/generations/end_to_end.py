"""From prompt to audio on both sides, beside what chance alone does: spectra, loudness (ITU-R BS.1770-4), width."""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import platformdirs
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from sa3_convert.arrays import Floats
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.metrics import compare
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.check.results import FINITE, Progress, derived
from sa3_convert.components import Component
from sa3_convert.convert.cache import cache_beside
from sa3_convert.errors import VerificationError
from sa3_convert.lab.generations.trajectory import STEPS, GenerationCase, Memory, StagedPipeline
from sa3_convert.runtime.engines import EngineName, bundle_engine
from sa3_convert.runtime.levels import loudness
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.system.checked_files import cached_repository
from sa3_convert.system.files import partial_folder

WINDOWS = (512, 2048, 8192)
"""Samples per frame: from transients to tones."""
_FLOOR_DB = 80.0
"""How far below a piece's loudest bin quieter ones still count."""
_SILENCE = 1e-20
_ENVELOPE = 2048
_FRAMES_AT_ONCE = 256


@dataclass(frozen=True, config=FINITE)
class AudioFidelity:
    """Figures of a target's audio against the reference's."""

    spectral_distance_db: tuple[float, ...]
    """One per entry of `WINDOWS`: root mean square difference of log magnitudes in a frame, mean over frames and
    channels. 0 for the same audio."""
    envelope_correlation: float
    """Pearson's, of the level in frames of 2048 samples; 1 for the same audio."""
    loudness_db: float
    """Integrated loudness of the target less that of the reference, in LU; see `loudness` for silence."""
    width: float
    """Share of the side signal in the energy, target less reference; between -1 and 1."""

    @derived
    def mean_spectral_distance_db(self) -> float:
        """Mean over the window sizes."""
        return sum(self.spectral_distance_db) / len(self.spectral_distance_db)


def compare_audio(reference: Floats, target: Floats, sample_rate: int) -> AudioFidelity:
    """Compare two pieces, each [channels, samples] float32, of one or two channels and at least one sample."""
    if reference.shape != target.shape or reference.ndim != 2 or reference.size == 0:
        raise VerificationError(f"Audio of shape {list(target.shape)} is compared with {list(reference.shape)}.")
    if not (np.isfinite(reference).all() and np.isfinite(target).all()):
        raise VerificationError("Audio that is compared holds NaN or infinity.")
    first, second = reference.astype(np.float64), target.astype(np.float64)
    return AudioFidelity(
        spectral_distance_db=tuple(spectral_distance(first, second, window) for window in WINDOWS),
        envelope_correlation=_correlation(_envelope(first), _envelope(second)),
        loudness_db=loudness(second, sample_rate) - loudness(first, sample_rate),
        width=_side_share(second) - _side_share(first),
    )


def spectral_distance(reference: NDArray[np.float64], target: NDArray[np.float64], window: int) -> float:
    """Return the log-spectral distance in dB; [channels, samples] each, padded with silence to whole frames.

    Bins more than 80 dB below the reference's loudest count as just that quiet.
    """
    peak = max((frames.max(initial=0.0) for frames in _power(reference, window)), default=0.0)
    floor = max(peak * 10 ** (-_FLOOR_DB / 10), _SILENCE)
    total = count = 0.0
    for first, second in zip(_power(reference, window), _power(target, window), strict=True):
        difference = 10 * np.log10(np.maximum(second, floor) / np.maximum(first, floor))
        distances = np.sqrt(np.mean(difference**2, axis=-1))
        total += float(distances.sum())
        count += distances.size
    return total / count


def _power(audio: NDArray[np.float64], window: int) -> Iterator[NDArray[np.float64]]:
    """Yield power spectra [frames, bins] of Hann windows that overlap by three quarters, some frames at a time."""
    hop = window // 4
    for channel in audio:
        missing = max(window - channel.size, -(channel.size - window) % hop)
        frames = np.lib.stride_tricks.sliding_window_view(np.pad(channel, (0, missing)), window)[::hop]
        for start in range(0, len(frames), _FRAMES_AT_ONCE):
            yield np.abs(np.fft.rfft(frames[start : start + _FRAMES_AT_ONCE] * np.hanning(window), axis=-1)) ** 2


def _envelope(audio: NDArray[np.float64]) -> NDArray[np.float64]:
    energy = (audio**2).mean(axis=0)
    padded = np.pad(energy, (0, -energy.size % _ENVELOPE))
    root: NDArray[np.float64] = np.sqrt(padded.reshape(-1, _ENVELOPE).mean(axis=1))
    return root


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    first, second = first - first.mean(), second - second.mean()
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    # What does not vary correlates with nothing but itself.
    if scale < _SILENCE:
        return 1.0 if np.array_equal(first, second) else 0.0
    return float(np.clip((first * second).sum() / scale, -1, 1))


def _side_share(audio: NDArray[np.float64]) -> float:
    if audio.shape[0] != 2:
        return 0.0
    middle, side = audio[0] + audio[1], audio[0] - audio[1]
    energy = float((middle**2).sum() + (side**2).sum())
    return float((side**2).sum()) / energy if energy > 0 else 0.0


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
    """Return where a bundle's reference outputs are kept: in the folder of stages that `convert` keeps beside it.

    Nothing is put into the hub's cache.
    """
    if cached_repository(bundle.path) is not None:
        return Path(platformdirs.user_cache_dir("sa3-convert")) / "references"
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
        return mean_spectra([c.target for c in self.cases]) / max(mean_spectra([c.chaos for c in self.cases]), 1e-9)

    @derived
    def judgement(self) -> str:
        """What the figures amount to, in words."""
        ratio = self.chaos_ratio
        over = "In the one generation" if len(self.cases) == 1 else f"Over {len(self.cases)} generations"
        target, chaos = [case.target for case in self.cases], [case.chaos for case in self.cases]
        figures = (
            f"{over} the target's spectra are {mean_spectra(target):.2f} dB from the reference's (cosine of the "
            f"latents {mean_cosine(target):z.5f}); the reference itself, its noise nudged by {self.nudge:g}, "
            f"{mean_spectra(chaos):.2f} dB ({mean_cosine(chaos):z.5f})."
        )
        if ratio <= 1:
            return f"{figures} The conversion changes less than such a nudge does: chance alone does as much."
        return f"{figures} The conversion changes {ratio:.1f} times as much as such a nudge does."


def mean_spectra(divergences: Sequence[Divergence]) -> float:
    """Return the mean spectral distance, in dB."""
    return math.fsum(d.audio.mean_spectral_distance_db for d in divergences) / len(divergences)


def mean_cosine(divergences: Sequence[Divergence]) -> float:
    """Return the mean cosine of latents."""
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
        results.append(compared(references, target, case, heard))
    target.close()
    return EndToEnd(tuple(results))


def compared(references: StagedPipeline, target: StagedPipeline, case: GenerationCase, heard: Heard) -> EndToEndCase:
    """Return how far target and nudged reference are from the reference in one case."""
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
