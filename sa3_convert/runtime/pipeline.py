"""Text to audio and its variations: the stages in order, each loading what it needs and letting go of it."""

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from sa3_convert.arrays import Floats, Session, host
from sa3_convert.bundle.manifest import Manifest
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import Component
from sa3_convert.errors import BundleError
from sa3_convert.runtime import autoencode
from sa3_convert.runtime import conditioning as conditions
from sa3_convert.runtime.adapters import Slotted, slotted_models, slotted_networks
from sa3_convert.runtime.autoencode import Bottleneck
from sa3_convert.runtime.conditioning import Conditioning, Encodings, Lengths, given_audio, inpaint_mask
from sa3_convert.runtime.denoising import denoised, velocity_of
from sa3_convert.runtime.engines import Engine, EngineName, bundle_engine, checkpoint_parts
from sa3_convert.runtime.events import AudioChunk, Event, Generation, Notes, Report, Started, Stepped
from sa3_convert.runtime.levels import level
from sa3_convert.runtime.loop import closed
from sa3_convert.runtime.models import KeepLoaded, Models
from sa3_convert.runtime.output_checks import OutputCheck
from sa3_convert.runtime.prompts import PromptTokenizer, Tokens
from sa3_convert.runtime.request import GenerateRequest, ResolvedRequest
from sa3_convert.runtime.sampling import DRAWING, Step, Velocity, evaluated, guided
from sa3_convert.runtime.setting_values import AdapterRequest


class Pipeline:
    """Generates audio with the models of one bundle.

    Args:
        layout: dimensions of the checkpoint.
        engine: what loads and runs the models.
        tokenizer: of the same checkpoint.
        bottleneck: of the same checkpoint.
        keep_loaded: keep models between stages and generations, for servers and batches, or the one used last; else
            each is freed after its stage, so that memory holds one at a time.
        window: latents per run of the autoencoder; smaller needs less memory and computes a little more.

    """

    def __init__(
        self,
        layout: CheckpointLayout,
        engine: Engine,
        tokenizer: PromptTokenizer,
        bottleneck: Bottleneck,
        *,
        keep_loaded: KeepLoaded = False,
        window: int = autoencode.WINDOW,
    ) -> None:
        self.layout = layout
        self.models = Models(engine, keep_loaded=keep_loaded)
        self.manifest: Manifest | None = None
        """Of the bundle that was opened, if it is one: what is said of the models comes from the same opening."""
        self._bottleneck = bottleneck
        self._tokenizer = tokenizer
        self._window = window
        self._encodings = Encodings()
        self.adapters: Sequence[AdapterRequest] = ()
        """LoRAs of generations whose request names none; they can be changed from one to the next."""
        self.open_slotted: Callable[[], Slotted] | None = None
        """Opens the models that take adapters, when they are first needed."""
        self._slotted: Slotted | None = None

    @classmethod
    def from_bundle(
        cls,
        path: Path,
        engine: EngineName | Literal["auto"] = "auto",
        *,
        check: bool = True,
        keep_loaded: KeepLoaded = False,
        window: int = autoencode.WINDOW,
        adapters: Sequence[AdapterRequest] = (),
        **options: Any,
    ) -> Self:
        """Open a bundle.

        Args:
            path: the bundle's folder.
            engine: "mnn", "onnxruntime" (which needs the reference ONNX files of the bundle), "onnxruntime-int8" or
                "onnxruntime-fp16" (which need those of `convert --with-ort-int8` and `--with-onnx fp16`), or "torch"
                (which needs the checkpoint). "auto" is the fastest that bundle, machine and options have.
            check: compare the bundle's models with its manifest first (reads them all once).
            keep_loaded: see the class.
            window: see the class.
            adapters: LoRAs to begin with; with some, "auto" is an engine whose models take them.
            **options: of the engine: `threads`; for MNN `memory`, `precision` (low goes to models that are right with
                it, normal to the others), `backend` and `split` (run the DiT that `convert --with-split-dit` makes,
                which takes no adapters);
                for torch `checkpoint`, the folder that the bundle was made from, `padding`, and `precision` (normal
                computes products in halves).

        Raises:
            BundleError: the bundle is missing, damaged, or cannot generate.
            CheckpointError: the checkpoint for torch is not the bundle's own.
            UsageError: there is no such engine, or it has no such option.

        """
        bundle = Bundle.open(path)
        if bundle.layout.dit is None:
            raise BundleError(
                f"{path} holds an autoencoder alone ({bundle.manifest.variant}); it cannot generate. "
                "Give a bundle of a whole checkpoint."
            )
        if engine == "auto":
            from sa3_convert.runtime.placement import engine_for

            known: dict[str, Any] = {"checkpoint": "checkpoint" in options, "adapters": bool(adapters)}
            engine, _ = engine_for(bundle, options.get("backend", "cpu"), options, **known)
        runner = bundle_engine(bundle, engine, options, check=check)
        pipeline = cls.of(bundle, runner, keep_loaded=keep_loaded, window=window)
        pipeline.open_slotted = partial(slotted_models, bundle, engine, options, check=check, keep_loaded=keep_loaded)
        pipeline.adapters = adapters
        return pipeline

    @classmethod
    def from_pretrained(
        cls, bundle: str | Path, engine: EngineName | Literal["auto"] = "auto", *, offline: bool = False, **how: Any
    ) -> Self:
        """Open a bundle by its folder or by its id on the hub, `ORG/NAME[/FOLDER][@REVISION]`.

        Args:
            bundle: what is downloaded into the hub's cache unless it is a folder; see `bundle.hub.bring_bundle`.
            engine: see `from_bundle`.
            offline: take what was downloaded before, and use no network.
            **how: see `from_bundle`.

        """
        from sa3_convert.bundle.hub import bring_bundle

        return cls.from_bundle(bring_bundle(Path(bundle), offline=offline), engine, **how)

    @classmethod
    def of(
        cls, bundle: Bundle, engine: Engine, *, keep_loaded: KeepLoaded = False, window: int = autoencode.WINDOW
    ) -> Self:
        """Return a pipeline over an open bundle, whose models an engine of one's own loads; see `from_bundle`."""
        with bundle.reading("tokenizer") as file, bundle.reading("bottleneck_params") as parameters:
            tokenizer = PromptTokenizer(file, bundle.layout.text_encoder)
            bottleneck = Bottleneck.read(parameters, bundle.layout.autoencoder.latent_dim)
            pipeline = cls(bundle.layout, engine, tokenizer, bottleneck, keep_loaded=keep_loaded, window=window)
        pipeline.manifest = bundle.manifest
        return pipeline

    @classmethod
    def from_checkpoint(
        cls, folder: Path, *, keep_loaded: KeepLoaded = False, window: int = autoencode.WINDOW, **options: Any
    ) -> Self:
        """Open a checkpoint with the torch engine, the reference that bundles are compared with; see `from_bundle`."""
        engine, file, bottleneck = checkpoint_parts(folder, options)
        layout, used = engine.checkpoint.layout, engine.checkpoint.tokenizer
        tokenizer = PromptTokenizer(file, layout.text_encoder, None if used is None else used.content)
        pipeline = cls(layout, engine, tokenizer, bottleneck, keep_loaded=keep_loaded, window=window)
        pipeline.open_slotted = partial(slotted_networks, engine, keep_loaded=keep_loaded)
        return pipeline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free models that were kept."""
        self.models.close()
        if self._slotted is not None:
            self._slotted.models.close()

    def engine(self, *, adapters: bool) -> Engine:
        """Return what runs generations, with adapters or without; BundleError if there are no models with slots."""
        return self.slotted().models.engine if adapters else self.models.engine

    def slotted(self) -> Slotted:
        """Return the models that take adapters; BundleError if there are none."""
        if self._slotted is None:
            if self.open_slotted is None:
                raise BundleError("Adapters need a bundle with slots for them (`convert --adapter-slots`).")
            self._slotted = self.open_slotted()
        return self._slotted

    def _prepared(self, request: ResolvedRequest, sizes: Lengths) -> list[str]:
        levels = evaluated(request.sampler, request.schedule(sizes))
        return self.slotted().prepare(request.adapters, levels) if request.adapters else []

    @contextlib.contextmanager
    def _use(self, component: Component, request: ResolvedRequest) -> Iterator[Session]:
        """Yield a model that adapters change: that with slots if there are any, else the plain one."""
        if request.adapters:
            models = self.slotted().use(component, request.adapters, request.init_noise_level)
        else:
            models = self.models.use(component)
        with models as session:
            yield session

    def generate(self, request: GenerateRequest, *, allow: Collection[str] = ()) -> Generation:
        """Generate a whole piece; see `stream`."""
        report: Report | None = None
        chunks: list[Floats] = []
        for event in self.stream(request, allow=allow):
            if isinstance(event, AudioChunk):
                chunks.append(event.samples)
            elif isinstance(event, Report):
                report = event
        assert report is not None
        return Generation(np.concatenate(chunks, axis=1), self.layout.sample_rate, report)

    def stream(self, request: GenerateRequest, *, allow: Collection[str] = ()) -> Generator[Event, None, None]:
        """Generate, and yield what happens as it happens: stages, denoising steps, audio, and a report at the end.

        Audio chunks come as they are decoded, a loop as a whole. Closing the iterator stops the work and frees models.
        Prompts and audio that were encoded lately are not encoded again.

        Args:
            request: what to generate.
            allow: names of output checks to waive; see `output_checks.CHECKS`.

        Raises:
            UsageError: the request does not suit the model.
            AudioError: given audio cannot be used.
            BundleError: a model that is needed is not in the bundle.
            OutputRejectedError: the audio failed a check. Chunks that were yielded before are then not to be trusted.

        """
        # Those of now: they may be others when the generation has ended.
        own = request if request.adapters else replace(request, adapters=tuple(self.adapters))
        settings = own.resolved(self.layout)
        sizes = settings.lengths(self.layout)
        check, notes = OutputCheck(allow), Notes(settings.contradictions(sizes) + self._prepared(settings, sizes))
        rate, loop = self.layout.sample_rate, settings.loop is not None
        leveller = level(settings.peak, settings.loudness, rate, notes.warnings.append, loop=loop)
        # Everything that can be wrong with the request is found before the first model is loaded.
        initial = given_audio(self.layout, request.init_audio, sizes, notes.warnings)
        inpainted = given_audio(self.layout, request.inpaint_audio, sizes, notes.warnings)
        mask = inpaint_mask(self.layout, sizes, settings.inpaint)

        yield Started("text")
        with notes.timed("text"):
            words = self.condition(settings, notes)
        start = kept = None
        if initial is not None or inpainted is not None:
            yield Started("encode")
            with notes.timed("encode"):
                start, kept = self.encode(initial, inpainted)

        yield Started("denoise")
        latents: Floats | None = None
        with closing(self.denoise(settings, sizes, *words, (mask, kept), start)) as steps:
            while (step := notes.timed_next(steps, "denoise")) is not None:
                latents = step.x
                yield Stepped(step, settings.steps)
        assert latents is not None

        yield Started("decode")
        done = 0
        with closing(self.decode(latents, sizes.samples + sizes.fade)) as decoded:
            chunks = closed(decoded, sizes.samples, sizes.fade)
            while (audio := notes.timed_next(chunks, "decode")) is not None:
                check.add(audio)
                if (ready := leveller.add(audio[0])).size:
                    yield AudioChunk(done, ready)
                    done += ready.shape[1]
        check.finish(sizes.samples)
        if (rest := leveller.finish()).size:
            yield AudioChunk(done, rest)
        engine = self.engine(adapters=bool(settings.adapters))
        yield Report(settings, sizes, host(latents), notes.seconds, engine.settings, tuple(notes.warnings))

    def tokens(self, prompt: str) -> Tokens:
        """Return the token ids of a prompt."""
        return self._tokenizer.encode(prompt)

    def prompt_embeddings(self, *prompts: Tokens) -> list[Floats]:
        """Return [1, tokens, D] for each prompt; at padded positions it is the learned padding."""

        def encode(missing: list[int]) -> list[Floats]:
            with self.models.use(Component.TEXT_ENCODER) as text_encoder:
                feeds = ({"input_ids": prompts[i].ids, "attention_mask": prompts[i].mask} for i in missing)
                return [text_encoder.run(feed)["last_hidden_state"] for feed in feeds]

        return self._encodings.of([(tokens.ids, tokens.mask) for tokens in prompts], encode)

    def seconds_embedding(self, seconds: float, request: ResolvedRequest | None = None) -> Floats:
        """Return [1, 1, D] for a duration, with the adapters of a request."""
        component = Component.NUMBER_CONDITIONER
        with self.models.use(component) if request is None else self._use(component, request) as number_conditioner:
            return number_conditioner.run({"seconds": np.array([seconds], np.float32)})["embedding"]

    def condition(self, request: ResolvedRequest, notes: Notes) -> tuple[Conditioning, Conditioning | None]:
        """Return the conditioning under the prompt, and what guidance compares it with if there is guidance."""
        guidance = request.cfg_scale != 1
        prompts = {"prompt": self.tokens(request.prompt)}
        if request.negative_prompt is not None and guidance:
            prompts["negative prompt"] = self.tokens(request.negative_prompt)
        for name, found in prompts.items():
            if found.dropped:
                kept = found.ids.shape[1]
                notes.warnings.append(
                    f"The {name} is too long: of its {kept + found.dropped} tokens only the first {kept} are heard."
                )
        prompt, *negative = self.prompt_embeddings(*prompts.values())
        seconds = self.seconds_embedding(request.generated_seconds, request)
        prompted = conditions.conditioning(prompt, seconds)
        if not guidance:
            return prompted, None
        if not negative:
            return prompted, prompted.without_prompt()
        return prompted, conditions.negative_conditioning(negative[0], prompts["negative prompt"], seconds)

    def encode(self, *audio: Floats | None) -> list[Floats | None]:
        """Return the latents [1, C, T] of each that `given_audio` returned."""
        auto, window = self.layout.autoencoder, self._window
        given = [one for one in audio if one is not None]

        def encode(missing: list[int]) -> list[Floats]:
            with self.models.use(Component.ENCODER) as encoder:
                found = (autoencode.encoded(encoder, given[i], auto, window=window) for i in missing)
                return [self._bottleneck.encode(latents) for latents in found]

        latents = iter(self._encodings.of([(one,) for one in given], encode))
        return [None if one is None else next(latents) for one in audio]

    def forget(self) -> None:
        """Forget what was encoded, so that the next generation encodes again."""
        self._encodings = Encodings()

    @contextlib.contextmanager
    def velocity(
        self,
        request: ResolvedRequest,
        sizes: Lengths,
        prompted: Conditioning,
        unprompted: Conditioning | None = None,
        inpainting: tuple[Floats | None, Floats | None] = (None, None),
    ) -> Iterator[Velocity]:
        """Yield the velocity of the DiT under a conditioning, with guidance if there is something to compare it with.

        `inpainting` is the mask [1, 1, T], 1 = keep, and the latents [1, C, T] of what it keeps.
        """
        padding_mask = sizes.padding_mask()
        local = conditions.local_conditioning(self.layout.autoencoder.latent_dim, sizes.latents, *inpainting)
        with self._use(Component.DIT, request) as dit:
            velocity = velocity_of(dit, prompted, local, padding_mask)
            if unprompted is not None:
                velocity = guided(
                    velocity,
                    velocity_of(dit, unprompted, local, padding_mask),
                    cfg_scale=request.cfg_scale,
                    apg_scale=request.apg_scale,
                    padding_mask=padding_mask,
                    cfg_interval=request.cfg_interval,
                    cfg_rescale=request.cfg_rescale,
                    cfg_norm_threshold=request.cfg_norm_threshold,
                )
            yield velocity

    def denoise(
        self,
        request: ResolvedRequest,
        sizes: Lengths,
        prompted: Conditioning,
        unprompted: Conditioning | None = None,
        inpainting: tuple[Floats | None, Floats | None] = (None, None),
        initial: Floats | None = None,
    ) -> Generator[Step, None, None]:
        """Yield the steps from noise, or noised initial latents, to latents [1, C, T]; see `velocity`."""
        noise = self.models.engine.noise(request.seed, 1 + request.steps * (request.sampler in DRAWING))
        with self.velocity(request, sizes, prompted, unprompted, inpainting) as velocity:
            yield from denoised(velocity, request, self.layout.autoencoder.latent_dim, sizes, noise, initial)

    def decode(self, latents: Floats, samples: int | None = None) -> Generator[Floats, None, None]:
        """Yield the audio of latents [1, C, T], [1, 2, n] at a time, not clipped; see `autoencode.decoded`."""
        with self.models.use(Component.DECODER) as decoder:
            half = self.layout.autoencoder.decoder
            room = getattr(decoder, "room", None)
            window = max(self._window, room(half.width) // half.group if room else 0)
            chunks = autoencode.decoded(decoder, latents, self.layout.autoencoder, samples=samples, window=window)
            yield from map(host, chunks)
