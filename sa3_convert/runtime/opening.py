"""How a pipeline is opened, as data: another process opens the same one with it, and holds it from work to work."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import ADAPTED, components_of
from sa3_convert.errors import BundleError
from sa3_convert.runtime.engines import KINDS, EngineName, MnnEngine, OrtEngine, TorchEngine
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.setting_values import AdapterRequest
from sa3_convert.scheduling import BESIDE_WEIGHTS, Latest

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint


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
            options["loras"] = tuple(str(Path(text).expanduser().absolute()) for text in loras)
        return replace(self, path=self.path.absolute(), options=options)

    def memory_bytes(self, *, adapters: bool = False) -> int:
        """Return how much memory it takes with all its models loaded: weights as stored and unpacked, and work.

        With adapters models with slots are loaded beside those without.
        """
        if self.of_checkpoint:
            from sa3_convert.checkpoint.reader import Checkpoint

            return BESIDE_WEIGHTS + 4 * _numbers(Checkpoint.open(self.path), adapters)
        manifest = Bundle.open(self.path).manifest
        stored = manifest.opened_bytes(
            KINDS.get(self.engine, "onnx"), split=bool(self.options.get("split")), adapters=adapters
        )
        # A bundle that came without references does not say how many numbers it has: four bits each, at the least.
        numbers = manifest.opened_bytes("onnx", adapters=adapters) or 8 * stored
        return BESIDE_WEIGHTS + stored + (stored if self.options.get("memory") == "low" else numbers)


def _numbers(checkpoint: "Checkpoint", adapters: bool) -> int:
    import math

    networks = (*components_of(checkpoint.layout), *(ADAPTED if adapters else ()))
    entries = (entry for component in networks for entry in checkpoint.stored(component).values())
    return sum(math.prod(entry.shape) for entry in entries)


def made_by(pipeline: Pipeline, *, adapters: bool = False) -> dict[str, Any]:
    """Return what audio files tell about the models that make them, with adapters or without.

    Of torch it is the weights; of a component in parts the last has its name, and the others have their files' names.
    """
    engine, manifest = pipeline.engine(adapters=adapters), pipeline.manifest
    if isinstance(engine, TorchEngine):
        checkpoint = engine.checkpoint
        models = {component.value: checkpoint.digest(component) for component in components_of(checkpoint.layout)}
    else:
        assert isinstance(engine, MnnEngine | OrtEngine)
        models = {component.value: file.content for component, file in engine.files.items()}
        if isinstance(engine, MnnEngine) and engine.parts is not None:
            models |= {part.path.stem: part.content for part in engine.parts[:-1]}
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
        "models": models,
        "engine": {name: value for name, value in engine.settings.items() if name != "threads"},
    }


def adapters_told(pipeline: Pipeline, requests: Sequence[AdapterRequest]) -> dict[str, Any]:
    """Return what audio files tell about the adapters that they are made with, beside `made_by`."""
    return {"adapters": pipeline.slotted().adapters.told(requests)} if requests else {}


_held = Latest[tuple[Opening, Mapping[bool, Mapping[str, Any]]], Pipeline]()


def held(opening: Opening, models: Mapping[bool, Mapping[str, Any]]) -> Pipeline:
    """Return a pipeline that this process keeps with its models loaded, until it is asked for another one.

    Args:
        opening: how it is opened.
        models: what `made_by` has told of them where the command was given, with adapters or without.

    Raises:
        BundleError: here stand other models under this path than those that `made_by` has told of.

    """

    def open_it(stack: contextlib.ExitStack) -> Pipeline:
        pipeline = stack.enter_context(opening.open(keep_loaded=True))
        if any(made_by(pipeline, adapters=adapters) != told for adapters, told in models.items()):
            raise BundleError(f"On this worker, {opening.path} holds other models than where the command was given.")
        return pipeline

    return _held.of((opening, models), open_it)
