"""What an error of each component does to what is heard, measured: one component's weights are nudged at a time.

Every layer of the nudged component gets Gaussian noise that costs the same at the component's output by measured
curvature, `NUDGE` of the output's energy in all. Of small errors the squared distance of the spectra grows as their
energy does, so its share by `NUDGE` is what one component's predicted error is worth against another's.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from pydantic import TypeAdapter

from sa3_convert.arrays import Floats
from sa3_convert.components import Component
from sa3_convert.convert.code_digest import code_digest
from sa3_convert.convert.plan import chosen_components
from sa3_convert.errors import UsageError
from sa3_convert.lab.common import tokenizer_of
from sa3_convert.lab.generations.end_to_end import compare_audio
from sa3_convert.lab.generations.trajectory import STEPS, GenerationCase
from sa3_convert.lab.planner.sensitivity import Sensitivity
from sa3_convert.runtime.engines import TorchEngine
from sa3_convert.runtime.output_checks import CHECKS
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.system.sealed import fingerprint, read_sealed, write_sealed

if TYPE_CHECKING:
    from torch import nn

    from sa3_convert.checkpoint.reader import Checkpoint

NUDGE: Final = 1e-3
"""Of the energy of a component's output; 30 dB."""
CASES: Final = (GenerationCase(0, 0, 2.0), GenerationCase(1, 1, 2.0), GenerationCase(2, 2, 2.0))
_REPLACED: Final = 0.5
"""How much of given audio is replaced by noise, where the encoder is judged."""
_HARMS: Final = TypeAdapter(dict[Component, float])


@dataclass(frozen=True)
class _Nudged(TorchEngine):
    """Runs the networks, one of them with weights that are a little off."""

    nudged: Component | None = None
    deviations: Mapping[str, float] = field(default_factory=dict)
    """Of the noise on each layer's weights."""

    def network(self, component: Component) -> "nn.Module":
        """Build a network; noise is seeded, so it is the same each time."""
        network = super().network(component)
        if component is self.nudged:
            generator = torch.Generator().manual_seed(0)
            for layer, deviation in self.deviations.items():
                weight = network.get_parameter(f"{layer}.weight")
                # The tensors are views of the checkpoint's file.
                weight.data = weight + deviation * torch.randn(weight.shape, generator=generator)
        return network


def harms(
    checkpoint: "Checkpoint",
    loras: Sequence[str],
    sensitivities: Mapping[Component, Sensitivity],
    cache: Path,
    tick: Callable[[int, int], None] = lambda done, of: None,
    threads: int | None = None,
) -> dict[Component, float]:
    """Return what errors do to a few short generations by the networks themselves, measured now or kept from before.

    Returns:
        Of each component the squared spectral distance, in dB², per share of its output's energy that is error.

    Raises:
        UsageError: the checkpoint cannot generate.

    """
    if checkpoint.layout.dit is None:
        raise UsageError("This checkpoint generates nothing, so nothing tells what an error does. Use --sizes.")
    digests = {component.value: checkpoint.digest(component) for component in chosen_components(checkpoint.layout, ())}
    nudged = {component.value: sensitivity.fingerprint for component, sensitivity in sensitivities.items()}
    key = fingerprint(
        digests=digests,
        tokenizer=tokenizer_of(checkpoint),
        nudged=nudged,
        code=code_digest(_measured),
        cases=repr(CASES),
        nudge=NUDGE,
    )
    kept = cache / "harm" / f"{key[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return _HARMS.validate_json(read_sealed(kept))
    # A pipeline keeps what it has encoded, so each nudged component has one of its own.
    opened = partial(Pipeline.from_checkpoint, checkpoint.folder, threads=threads, loras=loras)
    found = _measured(opened, sensitivities, tick, threads)
    write_sealed(kept, _HARMS.dump_json(found))
    return found


def _measured(
    opened: Callable[[], Pipeline],
    sensitivities: Mapping[Component, Sensitivity],
    tick: Callable[[int, int], None],
    threads: int | None,
) -> dict[Component, float]:
    found: dict[Component, float] = {}
    with opened() as pipeline:
        without = [_generated(pipeline, case) for case in CASES]
        given = [_generated(pipeline, case, audio) for case, audio in zip(CASES, without, strict=True)]
    for done, (component, sensitivity) in enumerate(sensitivities.items()):
        tick(done, len(sensitivities))
        encodes = component is Component.ENCODER
        with opened() as pipeline:
            plain = pipeline.models.engine
            assert isinstance(plain, TorchEngine)
            pipeline.models.engine = _Nudged(
                plain.checkpoint, threads=threads, nudged=component, deviations=_deviations(sensitivity)
            )
            heard = [
                _generated(pipeline, case, audio if encodes else None)
                for case, audio in zip(CASES, without, strict=True)
            ]
        squares = [
            compare_audio(expected, actual, pipeline.layout.sample_rate).mean_spectral_distance_db ** 2
            for expected, actual in zip(given if encodes else without, heard, strict=True)
        ]
        found[component] = sum(squares) / len(squares) / NUDGE
    return found


def _generated(pipeline: Pipeline, case: GenerationCase, audio: Floats | None = None) -> Floats:
    """Return [2, samples] of a case; with audio to start from the encoder takes part."""
    request = case.request(STEPS)
    if audio is not None:
        request = replace(request, init_audio=audio, init_noise_level=_REPLACED)
    return pipeline.generate(request, allow=CHECKS).audio


def _deviations(sensitivity: Sensitivity) -> dict[str, float]:
    """Return the standard deviation of each layer's noise; what moves nothing gets none."""
    moving = {layer: known.curvature for layer, known in sensitivity.layers.items() if known.curvature > 0}
    return {layer: math.sqrt(NUDGE / len(moving) / curvature) for layer, curvature in moving.items()}
