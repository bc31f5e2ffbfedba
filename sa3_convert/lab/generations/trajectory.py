"""One generation taken apart, on the reference and on the target: every velocity from noise to latents."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from sa3_convert.arrays import Arrays, Floats, Session
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.variants import defaults_of
from sa3_convert.components import SPECS, Component
from sa3_convert.convert.code_digest import code_digest
from sa3_convert.errors import UsageError
from sa3_convert.runtime.autoencode import decoded, patched
from sa3_convert.runtime.conditioning import Conditioning, conditioning, lengths, local_conditioning
from sa3_convert.runtime.engines import Engine
from sa3_convert.runtime.prompts import PromptTokenizer, Tokens
from sa3_convert.runtime.sampling import SAMPLERS, TorchGenerator, sigmas

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

Velocity = Callable[[Floats, np.float32], Floats]

_OTHER_STREAM = 1 << 31
_SEEDS = 1 << 64


@dataclass(frozen=True, slots=True)
class GenerationCase:
    """What is generated; its name says all of it.

    Raises:
        UsageError: there is no prompt of that number, or the seed does not fit into 64 bits.

    """

    prompt: int
    """Index into `PROMPTS`."""
    seed: int
    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.prompt < len(PROMPTS):
            raise UsageError(f"There is no prompt {self.prompt}; prompts are 0 to {len(PROMPTS) - 1}.")
        if not 0 <= self.seed < _SEEDS:
            raise UsageError(f"Seed {self.seed} is not within 0 … 2⁶⁴ − 1.")

    @property
    def name(self) -> str:
        """A name that `parse` reads back."""
        seconds = np.format_float_positional(self.seconds, trim="-")
        return f"prompt={self.prompt} seed={self.seed} seconds={seconds}"

    @property
    def text(self) -> str:
        """The prompt itself."""
        return PROMPTS[self.prompt]

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the case of a name.

        Raises:
            UsageError: it is no such name, or there is no prompt of that number.

        """
        found = re.fullmatch(r"prompt=(\d{1,3}) seed=(\d{1,20}) seconds=(\d{1,9}(?:\.\d+)?)", name.strip(), re.ASCII)
        if found is None or int(found[1]) >= len(PROMPTS):
            raise UsageError(
                f"{name!r} is no case. Write 'prompt=0 seed=1 seconds=5', with a prompt from 0 to {len(PROMPTS) - 1}."
            )
        return cls(int(found[1]), int(found[2]), float(found[3]))


def all_cases(prompts: Sequence[int], seeds: Sequence[int], seconds: Sequence[float]) -> tuple[GenerationCase, ...]:
    """Return every combination."""
    return tuple(GenerationCase(p, s, n) for n in seconds for p in prompts for s in seeds)


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


def denoised(
    velocity: Velocity, layout: CheckpointLayout, case: GenerationCase, *, steps: int, nudge: float = 0.0
) -> Trajectory:
    """Run the model's own default sampler, without guidance, and keep everything.

    Args:
        velocity: of the model, under the case's conditioning.
        layout: the checkpoint's dimensions.
        case: gives seed and duration.
        steps: of the schedule.
        nudge: standard deviation of what is added to every draw of noise, from a stream of its own. To every draw,
            because ping-pong forgets its start noise at the first step.

    Raises:
        UsageError: the duration is beyond the model's limit.

    """
    sizes = lengths(layout, case.seconds)
    generator, other = TorchGenerator(case.seed), TorchGenerator((case.seed + _OTHER_STREAM) % _SEEDS)

    def noise(shape: Sequence[int]) -> Floats:
        drawn = generator.randn(shape)
        return drawn + np.float32(nudge) * other.randn(shape) if nudge else drawn

    start = noise((1, layout.autoencoder.latent_dim, sizes.latents))
    inputs: list[Floats] = []
    times: list[np.float32] = []
    velocities: list[Floats] = []

    def recorded(x: Floats, t: np.float32) -> Floats:
        inputs.append(x)
        times.append(t)
        velocities.append(velocity(x, t))
        return velocities[-1]

    sampler = SAMPLERS[defaults_of(layout).sampler]
    latents = tuple(step.latents for step in sampler(recorded, start, sigmas(steps), noise))
    return Trajectory(tuple(inputs), tuple(times), tuple(velocities), latents, sizes.valid)


def replayed(
    velocities: Sequence[Floats], layout: CheckpointLayout, case: GenerationCase, *, nudge: float = 0.0
) -> Trajectory:
    """Return the trajectory of which only the velocities were kept; everything else follows from them."""
    rest = iter(velocities)
    return denoised(lambda x, t: next(rest), layout, case, steps=len(velocities), nudge=nudge)


def velocity_of(dit: Session, layout: CheckpointLayout, case: GenerationCase, condition: Conditioning) -> Velocity:
    """Return the DiT's velocity under a conditioning."""
    constant = dit_constants(layout, case, condition)

    def velocity(x: Floats, t: np.float32) -> Floats:
        return dit.run({"x": x, "t": np.array([t], np.float32), **constant})["out"]

    return velocity


def dit_constants(layout: CheckpointLayout, case: GenerationCase, condition: Conditioning) -> dict[str, Floats]:
    """Return those of the DiT's inputs that are the same in all steps."""
    sizes = lengths(layout, case.seconds)
    return {
        "cross_attn_cond": condition.cross_attn_cond,
        "global_embed": condition.global_embed,
        "local_add_cond": local_conditioning(layout.autoencoder.latent_dim, sizes.latents),
        "padding_mask": sizes.padding_mask(),
    }


class Side:
    """Runs the stages of generation with one engine; one model is in memory at a time, the one used last.

    Args:
        bundle: gives dimensions and tokenizer; it has a text encoder.
        engine: loads the models.

    """

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self.layout = bundle, bundle.layout
        self._engine = engine
        assert self.layout.text_encoder is not None
        with bundle.reading("tokenizer") as tokenizer:
            self._tokenizer = PromptTokenizer(tokenizer, self.layout.text_encoder)
        self._loaded: tuple[Component, Session] | None = None

    def model(self, component: Component) -> Session:
        """Return a model, loading it in place of the one before."""
        if self._loaded is None or self._loaded[0] is not component:
            self.close()
            self._loaded = component, self._engine.load(component)
        return self._loaded[1]

    def close(self) -> None:
        """Free the model that is loaded."""
        if self._loaded is not None:
            close = getattr(self._loaded[1], "close", None)
            if close is not None:
                close()
        self._loaded = None

    def tokens(self, case: GenerationCase) -> Tokens:
        """Return the case's prompt as token ids."""
        return self._tokenizer.encode(case.text)

    def prompt_embedding(self, case: GenerationCase) -> Floats:
        """Return [1, tokens, D]."""
        tokens = self.tokens(case)
        feeds = {"input_ids": tokens.ids, "attention_mask": tokens.mask}
        return self._run(Component.TEXT_ENCODER, feeds)

    def seconds_embedding(self, case: GenerationCase) -> Floats:
        """Return [1, 1, D]."""
        return self._run(Component.NUMBER_CONDITIONER, {"seconds": np.array([case.seconds], np.float32)})

    def trajectory(
        self, case: GenerationCase, condition: Conditioning, *, steps: int, nudge: float = 0.0
    ) -> Trajectory:
        """Return the denoising loop."""
        velocity = velocity_of(self.model(Component.DIT), self.layout, case, condition)
        return denoised(velocity, self.layout, case, steps=steps, nudge=nudge)

    def audio(self, case: GenerationCase, latents: Floats) -> Floats:
        """Return [1, 2, samples] for final latents [1, C, T]."""
        samples = lengths(self.layout, case.seconds).samples
        chunks = decoded(self.model(Component.DECODER), latents, self.layout.autoencoder, samples=samples)
        return np.concatenate(list(chunks), axis=2)

    def encoded(self, audio: Floats) -> Floats:
        """Return what the encoder gives for audio [1, 2, samples], padded with silence to whole pairs of latents."""
        auto = self.layout.autoencoder
        whole = auto.downsampling_ratio * (2 if SPECS[Component.ENCODER].even_latents else 1)
        audio = np.pad(audio, ((0, 0), (0, 0), (0, -audio.shape[2] % whole)))
        return self._run(Component.ENCODER, {"patched_audio": patched(audio, auto.patch_size)})

    def _run(self, component: Component, feeds: Arrays) -> Floats:
        (output,) = SPECS[component].contract(self.layout).outputs
        return self.model(component).run(feeds)[output.name]


class Target:
    """What the models that are judged make of each case; what was computed once is not computed again.

    Args:
        side: runs the models.
        steps: of the denoising loop.

    """

    def __init__(self, side: Side, steps: int) -> None:
        self.side, self.steps = side, steps
        self._prompts: dict[str, Floats] = {}
        self._seconds: dict[float, Floats] = {}
        self._latents: dict[GenerationCase, tuple[Floats, ...]] = {}

    def prompt_embedding(self, case: GenerationCase) -> Floats:
        """Return [1, tokens, D]."""
        if case.text not in self._prompts:
            self._prompts[case.text] = self.side.prompt_embedding(case)
        return self._prompts[case.text]

    def seconds_embedding(self, case: GenerationCase) -> Floats:
        """Return [1, 1, D]."""
        if case.seconds not in self._seconds:
            self._seconds[case.seconds] = self.side.seconds_embedding(case)
        return self._seconds[case.seconds]

    def embed(self, cases: Iterable[GenerationCase]) -> None:
        """Compute what the DiT is told in all cases, one model after the other."""
        cases = tuple(cases)
        for compute in (self.prompt_embedding, self.seconds_embedding):
            for case in cases:
                compute(case)

    def latents(self, case: GenerationCase) -> tuple[Floats, ...]:
        """Return the latents [1, C, T] after each step of the target's own way from noise."""
        if case not in self._latents:
            condition = conditioning(self.prompt_embedding(case), self.seconds_embedding(case))
            self._latents[case] = self.side.trajectory(case, condition, steps=self.steps).latents
        return self._latents[case]


class References:
    """What the reference makes of each case, computed when it is not in the store.

    Args:
        side: runs the reference models.
        store: where results are kept.
        steps: of the denoising loop.

    """

    def __init__(self, side: Side, store: ReferenceStore, steps: int) -> None:
        self.side, self._store, self.steps = side, store, steps
        files = {a.component: a for a in side.bundle.manifest.artifacts if a.kind == "onnx"}
        self._hashes = {c: [entry.sha256 for entry in a.files] for c, a in files.items() if c is not None}
        self._tokenizer = side.bundle.artifact(None, "tokenizer").sha256

    def _get(self, compute: Callable[[], Mapping[str, Floats]], **parts: Any) -> Mapping[str, Floats]:
        return self._store.get(compute, code=code_digest(Side), **parts)

    def prompt_embedding(self, case: GenerationCase) -> Floats:
        """Return [1, tokens, D]."""
        parts = {"model": self._hashes[Component.TEXT_ENCODER], "tokenizer": self._tokenizer, "prompt": case.text}
        return self._get(lambda: {"values": self.side.prompt_embedding(case)}, **parts)["values"]

    def seconds_embedding(self, case: GenerationCase) -> Floats:
        """Return [1, 1, D]."""
        parts = {"model": self._hashes[Component.NUMBER_CONDITIONER], "seconds": case.seconds}
        return self._get(lambda: {"values": self.side.seconds_embedding(case)}, **parts)["values"]

    def conditioning(self, case: GenerationCase) -> Conditioning:
        """Return what the DiT is told."""
        return conditioning(self.prompt_embedding(case), self.seconds_embedding(case))

    def trajectory(self, case: GenerationCase, *, nudge: float = 0.0) -> Trajectory:
        """Return the denoising loop; only its velocities are stored."""

        def compute() -> Mapping[str, Floats]:
            made = self.side.trajectory(case, self.conditioning(case), steps=self.steps, nudge=nudge)
            return {"velocities": np.stack(made.velocities)}

        stored = self._get(compute, **self._path(case, nudge))["velocities"]
        return replayed(list(stored), self.side.layout, case, nudge=nudge)

    def audio(self, case: GenerationCase, *, nudge: float = 0.0) -> Floats:
        """Return [1, 2, samples]."""

        def compute() -> Mapping[str, Floats]:
            return {"values": self.side.audio(case, self.trajectory(case, nudge=nudge).result)}

        parts = {"decoder": self._hashes[Component.DECODER], **self._path(case, nudge)}
        return self._get(compute, **parts)["values"]

    def encoded(self, case: GenerationCase) -> Floats:
        """Return what the encoder gives for the reference audio."""
        parts = {"encoder": self._hashes[Component.ENCODER], "decoder": self._hashes[Component.DECODER]}
        return self._get(lambda: {"values": self.side.encoded(self.audio(case))}, **parts, **self._path(case, 0.0))[
            "values"
        ]

    def _path(self, case: GenerationCase, nudge: float) -> dict[str, Any]:
        return {
            "models": [self._hashes[c] for c in (Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER, Component.DIT)],
            "tokenizer": self._tokenizer,
            "prompt": case.text,
            "seed": case.seed,
            "seconds": case.seconds,
            "steps": self.steps,
            "nudge": nudge,
        }
