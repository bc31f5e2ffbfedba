"""What an error of each component does to what is heard, measured: one component's weights are nudged at a time.

Every layer of the nudged component gets Gaussian noise that costs the same at the component's output by measured
curvature, `NUDGE` of the output's energy in all. Of small errors the squared distance of the spectra grows as their
energy does, so it says what one component's predicted error is worth against another's.

In the miniature's generations sounds can be recognised. Small errors lose none, so there each component is also nudged
by the most that a plan leaves it, and the sounds that it then loses have as much say as the spectra.
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
from sa3_convert.checkpoint.variants import is_miniature
from sa3_convert.components import Component
from sa3_convert.convert.code_digest import code_digest
from sa3_convert.convert.plan import chosen_components
from sa3_convert.errors import UsageError
from sa3_convert.lab.common import tokenizer_of
from sa3_convert.lab.generations.end_to_end import compare_audio
from sa3_convert.lab.generations.trajectory import STEPS, GenerationCase
from sa3_convert.lab.miniature.judge import Mode, judged
from sa3_convert.lab.planner.measuring import layers_to_measure, parameter_of
from sa3_convert.lab.planner.sensitivity import Sensitivity
from sa3_convert.lab.sweep.budget import MOST_ERROR
from sa3_convert.networks.autoencoder import fuse_weight_norms
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
    """Of the noise on each weight, by its name with weight norms fused."""

    def network(self, component: Component) -> "nn.Module":
        """Build a network; noise is seeded, so it is the same each time."""
        network = super().network(component)
        if component is self.nudged:
            fuse_weight_norms(network)
            generator = torch.Generator().manual_seed(0)
            for name, deviation in self.deviations.items():
                weight = network.get_parameter(name)
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
        Of each component how much more or less one and the same error does there than in another one: in no unit.

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
        nudges=(NUDGE, MOST_ERROR),
    )
    kept = cache / "harm" / f"{key[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return _HARMS.validate_json(read_sealed(kept))
    opened = partial(Pipeline.from_checkpoint, checkpoint.folder, threads=threads, loras=loras)
    found = _measured(opened, sensitivities, tick)
    write_sealed(kept, _HARMS.dump_json(found))
    return found


def _measured(
    opened: Callable[[], Pipeline], sensitivities: Mapping[Component, Sensitivity], tick: Callable[[int, int], None]
) -> dict[Component, float]:
    spectra: dict[Component, float] = {}
    lost: dict[Component, float] = {}
    with opened() as pipeline:
        without = [_generated(pipeline, case) for case in CASES]
        given = [_generated(pipeline, case, audio) for case, audio in zip(CASES, without, strict=True)]
        rate = pipeline.layout.sample_rate
        modes = {_mode(component) for component in sensitivities} if is_miniature(pipeline.layout) else set()
        recognised = {mode: _recognised(pipeline, mode) for mode in modes}
    for done, (component, sensitivity) in enumerate(sensitivities.items()):
        tick(done, len(sensitivities))
        encodes = component is Component.ENCODER
        with _nudged(opened, component, sensitivity, NUDGE) as pipeline:
            heard = [
                _generated(pipeline, case, audio if encodes else None)
                for case, audio in zip(CASES, without, strict=True)
            ]
        spectra[component] = sum(
            compare_audio(expected, actual, rate).mean_spectral_distance_db ** 2
            for expected, actual in zip(given if encodes else without, heard, strict=True)
        )
        if recognised:
            mode = _mode(component)
            with _nudged(opened, component, sensitivity, MOST_ERROR) as pipeline:
                lost[component] = len(recognised[mode] - _recognised(pipeline, mode))
    return together(spectra, lost)


def _nudged(opened: Callable[[], Pipeline], component: Component, sensitivity: Sensitivity, energy: float) -> Pipeline:
    """Return a pipeline one of whose components is off by a share of its output's energy.

    A pipeline keeps what it has encoded, so each nudged component has one of its own.
    """
    pipeline = opened()
    plain = pipeline.models.engine
    assert isinstance(plain, TorchEngine)
    # What moves nothing gets no noise.
    moving = {layer: known.curvature for layer, known in sensitivity.layers.items() if known.curvature > 0}
    stored = layers_to_measure(plain.checkpoint, component)
    deviations = {
        parameter_of(stored[layer]): math.sqrt(energy / len(moving) / curvature) for layer, curvature in moving.items()
    }
    pipeline.models.engine = _Nudged(plain.checkpoint, threads=plain.threads, nudged=component, deviations=deviations)
    return pipeline


def _mode(component: Component) -> Mode:
    return "audio to audio" if component is Component.ENCODER else "text to audio"


def _recognised(pipeline: Pipeline, mode: Mode) -> set[int]:
    """Return which of the miniature's prompts are recognised."""
    fits: list[bool] = []
    judged(pipeline, "torch", mode=mode, steps=STEPS, heard=lambda prompt, audio, wrong: fits.append(not wrong))
    return {index for index, fit in enumerate(fits) if fit}


def together(*measures: Mapping[Component, float]) -> dict[Component, float]:
    """Return what all measures say of each component, with as much weight; one that is nowhere above 0 has none."""
    told = [measure for measure in measures if sum(measure.values())]
    return {one: sum(measure[one] / sum(measure.values()) for measure in told) for one in measures[0]}


def _generated(pipeline: Pipeline, case: GenerationCase, audio: Floats | None = None) -> Floats:
    """Return [2, samples] of a case; with audio to start from the encoder takes part."""
    request = case.request(STEPS)
    if audio is not None:
        request = replace(request, init_audio=audio, init_noise_level=_REPLACED)
    return pipeline.generate(request, allow=CHECKS).audio
