"""The two sides of an end-to-end comparison: the stages of generation, on the reference or on the target."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.code_digest import code_digest
from sa3_convert.components import SPECS, Component
from sa3_convert.runtime.autoencode import decoded, patched
from sa3_convert.runtime.conditioning import Conditioning, conditioning
from sa3_convert.runtime.engines import Engine
from sa3_convert.runtime.lengths import lengths
from sa3_convert.runtime.prompts import PromptTokenizer, Tokens
from sa3_convert.session import Arrays, Session
from sa3_convert.verify.generation import GenerationCase, Trajectory, denoised, replayed, velocity_of
from sa3_convert.verify.reference_store import ReferenceStore

Floats = NDArray[np.float32]


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
