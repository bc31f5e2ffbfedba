"""How a pipeline is opened, as data: another process opens the same one with it, and holds it from work to work."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sa3_convert.bundle.manifest import ArtifactKind
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import components_of
from sa3_convert.errors import BundleError
from sa3_convert.runtime.engines import KINDS, EngineName, MnnEngine, OrtEngine, TorchEngine
from sa3_convert.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

_BESIDE_WEIGHTS: Final = 1 << 30
"""Bytes that a generation takes beside its weights; 0.3 to 0.8 GiB were measured, from 10 to 120 seconds of audio."""


@dataclass(frozen=True, slots=True)
class Opening:
    """A bundle, or for torch the checkpoint itself, with an engine and its options."""

    path: Path
    engine: EngineName
    options: Mapping[str, Any]

    @property
    def of_checkpoint(self) -> bool:
        """Whether there is no bundle."""
        return self.engine == "torch" and "checkpoint" not in self.options

    def open(self, **how: Any) -> Pipeline:
        """Open it; see `Pipeline.from_bundle` and `from_checkpoint`."""
        if self.of_checkpoint:
            return Pipeline.from_checkpoint(self.path, **how, **self.options)
        return Pipeline.from_bundle(self.path, self.engine, **how, **self.options)

    def elsewhere(self) -> "Opening":
        """Return the same for a process that may stand in another folder."""
        options: dict[str, Any] = {name: v.absolute() if isinstance(v, Path) else v for name, v in self.options.items()}
        if loras := options.get("loras"):
            options["loras"] = tuple(str(Path(text).absolute()) for text in loras)
        return replace(self, path=self.path.absolute(), options=options)

    def memory_bytes(self) -> int:
        """Return how much memory it takes with all its models loaded: weights as stored and unpacked, and work."""
        if self.of_checkpoint:
            from sa3_convert.checkpoint.reader import Checkpoint

            return _BESIDE_WEIGHTS + 4 * _numbers(Checkpoint.open(self.path))
        manifest = Bundle.open(self.path).manifest
        own: ArtifactKind = KINDS.get(self.engine, "onnx")
        sizes = {
            kind: sum(file.bytes for a in manifest.artifacts if a.kind == kind for file in a.files)
            for kind in (own, "onnx")
        }
        stored = sizes[own]
        # A bundle that came without references does not say how many numbers it has: four bits each, at the least.
        unpacked = stored if self.options.get("memory") == "low" else sizes["onnx"] or 8 * stored
        return _BESIDE_WEIGHTS + stored + unpacked


def _numbers(checkpoint: "Checkpoint") -> int:
    import math

    entries = (e for c in components_of(checkpoint.layout) for e in checkpoint.stored(c).values())
    return sum(math.prod(entry.shape) for entry in entries)


def made_by(pipeline: Pipeline, *, adapters: bool = False) -> dict[str, Any]:
    """Return what audio files tell about the models that make them, with adapters or without.

    Of a component in parts it is the last that is named; of torch it is the weights.
    """
    engine, manifest = pipeline.engine(adapters=adapters), pipeline.manifest
    if isinstance(engine, TorchEngine):
        checkpoint = engine.checkpoint
        models = {component: checkpoint.digest(component) for component in components_of(checkpoint.layout)}
    else:
        assert isinstance(engine, MnnEngine | OrtEngine)
        models = {component: file.sha256 for component, file in engine.files.items()}
    if manifest is not None:
        variant, recipe = manifest.variant, manifest.recipe if engine.name in KINDS else None
        loras = [{"name": lora.name, "sha256": lora.sha256, "strength": lora.strength} for lora in manifest.loras]
    else:
        assert isinstance(engine, TorchEngine)
        variant, recipe = engine.checkpoint.variant_name, None
        merged = engine.checkpoint.loras
        loras = [{"name": o.file.path.name, "sha256": o.file.sha256, "strength": o.strength} for o in merged]
    return {
        "variant": variant,
        **({"loras": loras} if loras else {}),
        "recipe": recipe,
        "models": {component.value: digest for component, digest in models.items()},
        "engine": {name: value for name, value in engine.settings.items() if name != "threads"},
    }


_held: list[tuple[Opening, Mapping[bool, Mapping[str, Any]], Pipeline]] = []
"""What this process has opened last, and what it said of its models."""


def held(opening: Opening, models: Mapping[bool, Mapping[str, Any]]) -> Pipeline:
    """Return a pipeline that this process keeps with its models loaded, until it is asked for another one.

    Args:
        opening: how it is opened.
        models: what `made_by` has told of them where the command was given, with adapters or without.

    Raises:
        BundleError: here stand other models under this path than those that `made_by` has told of.

    """
    if not _held or _held[0][:2] != (opening, models):
        while _held:
            _held.pop()[2].close()
        pipeline = opening.open(keep_loaded=True)
        if any(made_by(pipeline, adapters=adapters) != told for adapters, told in models.items()):
            raise BundleError(f"On this worker, {opening.path} holds other models than where the command was given.")
        _held.append((opening, models, pipeline))
    return _held[0][2]
