"""What is generated to judge a bundle, case by case, and generations taken apart.

The pipeline's own stages run one by one over prompts × seeds × durations, and every velocity on the way is kept.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays, Floats
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import SPECS, Component
from sa3_convert.convert.code_digest import code_digest
from sa3_convert.errors import UsageError
from sa3_convert.runtime.autoencode import encoded
from sa3_convert.runtime.conditioning import Conditioning, conditioning, lengths, max_seconds
from sa3_convert.runtime.denoising import denoised
from sa3_convert.runtime.engines import EngineName, OnHost
from sa3_convert.runtime.noise import TorchGenerator
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.prompts import Tokens
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.sampling import Velocity

PROMPTS: tuple[str, ...] = (
    "warm analog synth pad",
    "Fast drum and bass with a rolling sub bass, chopped amen breaks and bright vocal stabs, 174 BPM",
    "A door creaks open in an empty stone hall, footsteps come closer, then silence",
    "dog bark",
    "",
    "Ruhige Klaviermelodie in Moll, leise Streicher, ein Sommerabend am See",
    "雨の夜、静かなジャズトリオ、ブラシのドラムとウッドベース",
    (
        "Epic orchestral film score in D minor: low strings begin alone with a slow ostinato, French horns enter with "
        "the main theme, the choir joins in the second half, timpani rolls build to a climax with full brass and "
        "cymbals, then a solo cello repeats the theme over a held chord while the hall's reverberation fades away; "
        "recorded in a large scoring stage, wide stereo image, natural dynamics, no percussion loop, 72 BPM"
    ),
)
_END_TO_END_PROMPTS = (0, 1, 2, 6)
"""A sound, a piece of music, an effect, and a prompt that is not English."""


@dataclass(frozen=True, slots=True)
class GenerationCase:
    """What is generated; its name says all of it."""

    prompt: int
    """Index into `PROMPTS`."""
    seed: int
    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.prompt < len(PROMPTS):
            raise UsageError(f"There is no prompt {self.prompt}; prompts are 0 to {len(PROMPTS) - 1}.")
        self.request(steps=1)

    @property
    def name(self) -> str:
        """A name that `parse` reads back."""
        seconds = np.format_float_positional(self.seconds, trim="-")
        return f"prompt={self.prompt} seed={self.seed} seconds={seconds}"

    @property
    def text(self) -> str:
        """The prompt itself."""
        return PROMPTS[self.prompt]

    def request(self, steps: int) -> GenerateRequest:
        """Return the request: as the model suits it, but without guidance, so that each step evaluates the DiT once."""
        return GenerateRequest(self.text, seconds=self.seconds, seed=self.seed, steps=steps, cfg_scale=1.0)

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the case of a name; raise UsageError if it is none."""
        found = re.fullmatch(r"prompt=(\d{1,3}) seed=(\d{1,20}) seconds=(\d{1,9}(?:\.\d+)?)", name.strip(), re.ASCII)
        if found is None or int(found[1]) >= len(PROMPTS):
            raise UsageError(
                f"{name!r} is no case. Write 'prompt=0 seed=1 seconds=5', with a prompt from 0 to {len(PROMPTS) - 1}."
            )
        return cls(int(found[1]), int(found[2]), float(found[3]))


def all_cases(prompts: Sequence[int], seeds: Sequence[int], seconds: Sequence[float]) -> tuple[GenerationCase, ...]:
    """Return every combination."""
    return tuple(GenerationCase(p, s, n) for n in seconds for p in prompts for s in seeds)


def possible_cases(cases: Iterable[GenerationCase], layout: CheckpointLayout) -> tuple[GenerationCase, ...]:
    """Return the cases that are no longer than a model can generate."""
    return tuple(case for case in cases if case.seconds <= max_seconds(layout))


STEPS = 8
SEEDS = (0, 1)
DURATIONS = (2.0, 5.0, 10.0)
FULL_CASES: tuple[GenerationCase, ...] = all_cases(range(len(PROMPTS)), SEEDS, DURATIONS)
"""What a full verification generates."""


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


_OTHER_STREAM = 1 << 31
_SEEDS = 1 << 64


@dataclass(frozen=True)
class Trajectory:
    """One pass of the denoising loop with one velocity evaluation a step."""

    inputs: tuple[Floats, ...] = field(repr=False)
    """What the velocity was asked for, [1, C, T] a step."""
    times: tuple[np.float32, ...]
    velocities: tuple[Floats, ...] = field(repr=False)
    latents: tuple[Floats, ...] = field(repr=False)
    """After each step; the last is the result."""
    valid: int
    """Latents that are not padding."""

    @property
    def result(self) -> Floats:
        """The final latents, [1, C, T]."""
        return self.latents[-1]


def recorded(
    velocity: Velocity, layout: CheckpointLayout, case: GenerationCase, *, steps: int, nudge: float = 0.0
) -> Trajectory:
    """Run the denoising loop with the model's own default sampler and keep everything.

    To every draw of noise (ping-pong forgets its start noise at the first step) `nudge` times another one is added,
    from a stream of its own.
    """
    sizes = lengths(layout, case.seconds)
    generator, other = TorchGenerator(case.seed), TorchGenerator((case.seed + _OTHER_STREAM) % _SEEDS)

    def noise(shape: Sequence[int]) -> Floats:
        drawn = generator.randn(shape)
        return drawn + np.float32(nudge) * other.randn(shape) if nudge else drawn

    calls: list[tuple[Floats, np.float32, Floats]] = []

    def observed(x: Floats, t: np.float32) -> Floats:
        calls.append((x, t, velocity(x, t)))
        return calls[-1][2]

    loop = denoised(observed, case.request(steps).resolved(layout), layout.autoencoder.latent_dim, sizes, noise)
    latents = tuple(step.latents for step in loop)
    inputs, times, velocities = zip(*calls, strict=True)
    return Trajectory(inputs, times, velocities, latents, sizes.valid)


def replayed(
    velocities: Sequence[Floats], layout: CheckpointLayout, case: GenerationCase, *, nudge: float = 0.0
) -> Trajectory:
    """Return the trajectory of which only the velocities were kept; everything else follows from them."""
    rest = iter(velocities)
    return recorded(lambda x, t: next(rest), layout, case, steps=len(velocities), nudge=nudge)


class Store(Protocol):
    """Where results are kept by what they depend on, as `check.reference_store.ReferenceStore` does."""

    def get(self, compute: Callable[[], Mapping[str, NDArray[Any]]], **parts: Any) -> Mapping[str, NDArray[Any]]:
        """Return what belongs to `parts`, computed if it is not there."""
        ...


class Memory:
    """A store for one engine that lives no longer than its process."""

    def __init__(self) -> None:
        self._kept: dict[str, Mapping[str, NDArray[Any]]] = {}

    def get(self, compute: Callable[[], Mapping[str, NDArray[Any]]], **parts: Any) -> Mapping[str, NDArray[Any]]:
        """Return what belongs to `parts`, computed if it is not there."""
        key = repr(sorted(parts.items()))
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]


class StagedPipeline:
    """What a bundle's pipeline makes of each case, stage by stage; what is in the store is not computed again.

    Results are stored by the bundle's reference models, so those of other models need a store of their own.
    """

    def __init__(self, bundle: Bundle, pipeline: Pipeline, steps: int, store: Store) -> None:
        self.bundle, self.pipeline, self.steps, self._store = bundle, pipeline, steps, store
        self._hashes = {a.component: [e.sha256 for e in a.files] for a in bundle.manifest.artifacts if a.kind == "onnx"}
        self._tokenizer = bundle.artifact(None, "tokenizer").sha256

    def close(self) -> None:
        """Free the model that was used last."""
        self.pipeline.close()

    def tokens(self, case: GenerationCase) -> Tokens:
        """Return the case's prompt as token ids."""
        return self.pipeline.tokens(case.text)

    def prompt_embedding(self, case: GenerationCase) -> Floats:
        """Return [1, tokens, D]."""
        return self._kept(
            lambda: self.pipeline.prompt_embeddings(self.tokens(case))[0],
            model=self._hashes.get(Component.TEXT_ENCODER),
            tokenizer=self._tokenizer,
            prompt=case.text,
        )

    def seconds_embedding(self, case: GenerationCase) -> Floats:
        """Return [1, 1, D]."""
        return self._kept(
            lambda: self.pipeline.seconds_embedding(case.seconds),
            model=self._hashes.get(Component.NUMBER_CONDITIONER),
            seconds=case.seconds,
        )

    def conditioning(self, case: GenerationCase) -> Conditioning:
        """Return what the DiT is told."""
        return conditioning(self.prompt_embedding(case), self.seconds_embedding(case))

    def embed(self, cases: Iterable[GenerationCase]) -> None:
        """Compute what the DiT is told in all cases, one model after the other."""
        cases = tuple(cases)
        for compute in (self.prompt_embedding, self.seconds_embedding):
            for case in cases:
                compute(case)

    @contextlib.contextmanager
    def velocity(self, case: GenerationCase, condition: Conditioning) -> Iterator[Velocity]:
        """Yield the DiT's velocity under a conditioning, which may be another pipeline's."""
        layout = self.pipeline.layout
        request = case.request(self.steps).resolved(layout)
        with self.pipeline.velocity(request, lengths(layout, case.seconds), condition) as velocity:
            yield velocity

    def trajectory(self, case: GenerationCase, *, nudge: float = 0.0) -> Trajectory:
        """Return the denoising loop; only its velocities are kept."""
        layout = self.pipeline.layout

        def compute() -> Floats:
            with self.velocity(case, self.conditioning(case)) as velocity:
                return np.stack(recorded(velocity, layout, case, steps=self.steps, nudge=nudge).velocities)

        return replayed(list(self._kept(compute, **self._path(case, nudge))), layout, case, nudge=nudge)

    def audio(self, case: GenerationCase, *, nudge: float = 0.0) -> Floats:
        """Return [1, 2, samples]."""
        return self._kept(
            lambda: self.decoded(case, self.trajectory(case, nudge=nudge).result),
            decoder=self._hashes.get(Component.DECODER),
            **self._path(case, nudge),
        )

    def decoded(self, case: GenerationCase, latents: Floats) -> Floats:
        """Return [1, 2, samples] for final latents [1, C, T], which may be another pipeline's."""
        samples = lengths(self.pipeline.layout, case.seconds).samples
        return np.concatenate(list(self.pipeline.decode(latents, samples)), axis=2)

    def latents(self, case: GenerationCase) -> Floats:
        """Return what the encoder makes of this pipeline's own audio; see `encoded`."""
        return self._kept(
            lambda: self.encoded(self.audio(case)),
            encoder=self._hashes.get(Component.ENCODER),
            decoder=self._hashes.get(Component.DECODER),
            **self._path(case, 0.0),
        )

    def encoded(self, audio: Floats) -> Floats:
        """Return the encoder's own output, before the bottleneck and in one run.

        The audio [1, 2, samples] is padded with silence to whole pairs of latents.
        """
        auto = self.pipeline.layout.autoencoder
        latents = -(-audio.shape[2] // auto.downsampling_ratio)
        latents += latents % 2 if SPECS[Component.ENCODER].even_latents else 0
        padded = np.pad(audio, ((0, 0), (0, 0), (0, latents * auto.downsampling_ratio - audio.shape[2])))
        with self.pipeline.models.use(Component.ENCODER) as encoder:
            return encoded(encoder, padded, auto, window=latents)

    def _kept(self, compute: Callable[[], Floats], **parts: Any) -> Floats:
        return self._store.get(lambda: {"values": compute()}, code=code_digest(StagedPipeline), **parts)["values"]

    def _path(self, case: GenerationCase, nudge: float) -> dict[str, Any]:
        before = (Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER, Component.DIT)
        return {
            "models": [self._hashes.get(c) for c in before],
            "tokenizer": self._tokenizer,
            "prompt": case.text,
            "seed": case.seed,
            "seconds": case.seconds,
            "steps": self.steps,
            "nudge": nudge,
        }


def case_feeds(references: StagedPipeline, component: Component, case: GenerationCase, step: int | None) -> Arrays:
    """Return what a component is run with in a case, everything before it computed by the references.

    Of the DiT, and of it alone, a step of the denoising loop is named. Of audio that is decoded in several windows, the
    first one counts.
    """
    if (step is None) == (component is Component.DIT):
        raise UsageError("A step of the denoising loop (--step) goes with the DiT, and the DiT's case needs one.")
    recorder = _Recorder()
    bundle, steps = references.bundle, references.steps
    stages = StagedPipeline(bundle, Pipeline.of(bundle, recorder), steps, Memory())
    with contextlib.suppress(_RecordedError):
        if component is Component.TEXT_ENCODER:
            stages.prompt_embedding(case)
        elif component is Component.NUMBER_CONDITIONER:
            stages.seconds_embedding(case)
        elif step is not None:
            if not 0 <= step < steps:
                raise UsageError(f"There is no step {step}; steps are 0 to {steps - 1}.")
            path = references.trajectory(case)
            with stages.velocity(case, references.conditioning(case)) as velocity:
                velocity(path.inputs[step], path.times[step])
        elif component is Component.DECODER:
            stages.decoded(case, references.trajectory(case).result)
        else:
            stages.encoded(references.audio(case))
    return recorder.feeds


class _RecordedError(Exception):
    """Ends a run of which only the inputs are wanted."""


class _Recorder(OnHost):
    """An engine and its only session: keeps the first inputs that it is handed, and stops there."""

    name: EngineName = "onnxruntime"
    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self) -> None:
        self.feeds: Arrays = {}

    def load(self, component: Component) -> "_Recorder":
        return self

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        self.feeds = feeds
        raise _RecordedError
