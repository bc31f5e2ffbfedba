"""What a benchmark compares: engines with their settings, by the names they are asked for."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa3_convert.bundle.manifest import SPLIT_KINDS, Bundle
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, UsageError
from sa3_convert.runtime import autoencode
from sa3_convert.runtime.bottleneck import Bottleneck
from sa3_convert.runtime.engines import Engine, EngineName
from sa3_convert.runtime.opening import KINDS, bundle_engine, checkpoint_parts
from sa3_convert.runtime.pipeline import Floats, Pipeline
from sa3_convert.runtime.timed import Clock, TimedEngine

REFERENCE_CHUNK, REFERENCE_OVERLAP = 128, 32
"""How the published reference decodes by default, in latents."""

_ENGINES: Mapping[str, tuple[EngineName, Mapping[str, Any]]] = {
    "mnn": ("mnn", {}),
    "mnn-low": ("mnn", {"memory": "low"}),
    "mnn-split": ("mnn", {"split": True}),
    "onnxruntime": ("onnxruntime", {}),
    "onnxruntime-int8": ("onnxruntime-int8", {}),
    "torch": ("torch", {"padding": "value_zeroing"}),
}
NAMES = tuple(_ENGINES)


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine with settings; plain data, so that another process can open the same."""

    name: str
    source: str
    """The bundle's folder; of torch, the checkpoint's."""
    engine: EngineName
    options: Mapping[str, Any] = field(default_factory=dict)
    manifest: str | None = None
    """SHA-256 of the manifest of the bundle that was checked."""

    def open(self, clock: Clock, *, keep_loaded: bool) -> Pipeline:
        """Return a pipeline whose models are timed.

        Raises:
            Sa3Error: the bundle or checkpoint cannot be used, or the engine is not there.

        """
        path = Path(self.source)
        if self.engine == "torch":
            engine, tokenizer, bottleneck = checkpoint_parts(path, self.options)
            return _AsReference(
                engine.checkpoint.layout, TimedEngine(engine, clock), tokenizer, bottleneck, keep_loaded=keep_loaded
            )
        bundle = Bundle.open(path)
        if self.manifest not in (None, bundle.manifest.digest):
            raise BundleError(f"{path} was replaced by another bundle while it was measured. Run the command again.")
        runner: Engine = bundle_engine(bundle, self.engine, self.options)
        with bundle.reading("tokenizer") as tokenizer, bundle.reading("bottleneck_params") as parameters:
            bottleneck = Bottleneck.read(parameters, bundle.layout.autoencoder.latent_dim)
            return Pipeline(bundle.layout, TimedEngine(runner, clock), tokenizer, bottleneck, keep_loaded=keep_loaded)


class _AsReference(Pipeline):
    """Decodes everything, padding included, in the published reference's own chunks."""

    def decode(self, latents: Floats, samples: int | None = None) -> Generator[Floats, None, None]:
        with self._models.use(Component.DECODER) as decoder:
            audio = autoencode.decoded_with_overlap(
                decoder, latents, self.layout.autoencoder, chunk=REFERENCE_CHUNK, overlap=REFERENCE_OVERLAP
            )
            yield audio[:, :, :samples]


def contenders(
    bundle: Path, names: tuple[str, ...], *, checkpoint: Path | None = None, threads: int | None = None
) -> tuple[Contender, ...]:
    """Return what was asked for; without names everything that the bundle can run, and torch if there is a checkpoint.

    Raises:
        UsageError: no such engine, one is named twice, or torch without a checkpoint or the other way round.
        BundleError: the bundle, or a file that an engine needs, is missing or not what the manifest says.

    """
    opened = Bundle.open(bundle)
    kinds = {artifact.kind for artifact in opened.manifest.artifacts}
    if not names:
        names = tuple(
            n
            for n, (engine, options) in _ENGINES.items()
            if engine != "torch" and KINDS[engine] in kinds and ("split" not in options or SPLIT_KINDS[1] in kinds)
        )
        names += ("torch",) if checkpoint is not None else ()
    if unknown := [name for name in names if name not in _ENGINES]:
        raise UsageError(f"There is no engine {unknown[0]!r} to measure. There are: {', '.join(NAMES)}.")
    if len(set(names)) != len(names):
        raise UsageError("An engine is named twice; --repeats says how often each is measured.")
    if ("torch" in names) != (checkpoint is not None):
        raise UsageError("The torch engine runs a checkpoint: give --engine torch and --checkpoint DIR together.")
    common = {} if threads is None else {"threads": threads}
    found = []
    for name in names:
        engine, options = _ENGINES[name]
        if engine != "torch":
            bundle_engine(opened, engine, options)
        source, manifest = (checkpoint, None) if engine == "torch" else (bundle, opened.manifest.digest)
        found.append(Contender(name, str(source), engine, {**options, **common}, manifest))
    return tuple(found)
