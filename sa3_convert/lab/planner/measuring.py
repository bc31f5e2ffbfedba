"""The sensitivities of a component: a backward pass for each sample, wherever it runs, then every precision's price.

Both are done in parts, which leave what they find in the stage cache, under a hash of all that it depends on. It is
put together in the order of samples and layers, so nothing depends on where a part was done, or on which was first.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from pydantic import TypeAdapter
from torch import nn

from sa3_convert.check.inputs import sample_inputs
from sa3_convert.components import TOKEN_TABLE, Component
from sa3_convert.convert.cache import UNFINISHED, CachedResult, Notes, StageCache
from sa3_convert.convert.code_digest import code_digest
from sa3_convert.convert.plan import stage_keys
from sa3_convert.convert.stages import ComponentJob
from sa3_convert.errors import BackendError, InputError, Sa3Error
from sa3_convert.lab.common import Common
from sa3_convert.lab.planner.sensitivity import (
    SAMPLED_ROWS,
    LayerSensitivity,
    Sensitivity,
    all_grids,
    curvatures_of,
    mean_of,
    priced,
    read_curvatures,
    write_curvatures,
)
from sa3_convert.networks.autoencoder import fuse_weight_norms
from sa3_convert.networks.build import build_network
from sa3_convert.recipe import ComponentRecipe, ScaleType
from sa3_convert.rounding.grid import in_parallel
from sa3_convert.rounding.network import CALIBRATION_SEED
from sa3_convert.scheduling import Estimate, Latest, Runner, in_this_process
from sa3_convert.system.sealed import fingerprint, read_sealed, write_sealed

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

Tick = Callable[[str, int, int], None]
"""(what, done, of how many)."""

CASES: Final = {
    Component.TEXT_ENCODER: tuple((seed, 0) for seed in range(12)),
    Component.NUMBER_CONDITIONER: tuple((seed, 0) for seed in range(16)),
    # Twice the sampler's noise levels, at lengths from a second up: what tokens share weighs more in short ones.
    Component.DIT: tuple((seed, (96, 8, 32)[seed % 3]) for seed in range(16)),
    Component.DECODER: tuple((seed, 32) for seed in range(4)),
    Component.ENCODER: tuple((seed, 32) for seed in range(4)),
}
"""(seed, latents) of each sample."""
_DIRECTION: Final = ".weight_v"
"""How the name of a weight ends that is stored as its direction, beside `.weight_g`, its magnitude."""
_STAGE: Final = "curvature"
_FILE: Final = "curvature.safetensors"
_PRICED: Final = "prices.json"
_PRICES: Final = TypeAdapter(dict[str, LayerSensitivity])
_SECONDS_PER_GIB: Final = 20.0
"""Of a backward pass, on two cores."""
_LAYERS_AT_ONCE: Final = 16
"""That are priced before it is kept: some seconds of work."""
_SECONDS_PER_LAYER: Final = 0.15
_SECONDS_PER_NUMBER: Final = 1.7e-6
"""Of a sampled weight in all precisions, on two cores."""
_BESIDE_WEIGHTS: Final = 3 << 30
"""Bytes of activations, gradients and the process, of true-size components."""
_OF_TOYS: Final = 600 << 20
_held = Latest[str, nn.Module]()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(ABC):
    """A part of a measurement that any worker can do."""

    common: Common
    component: Component
    key: str
    """Of the measurement."""
    takes: Estimate
    needs: tuple[str, ...] = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """Its own among those that run together."""

    @property
    def place(self) -> tuple[str, str, type[Notes]]:
        """Where in the cache stands what it finds."""
        return f"{UNFINISHED}/{self.key}", fingerprint(part=self.name), Notes

    @abstractmethod
    def leave(self, folder: Path) -> Notes:
        """Do it, and leave what it finds in a folder."""

    def network(self, checkpoint: "Checkpoint") -> nn.Module:
        """Return the network, built once for the parts of a measurement that this process does."""
        return _held.of(self.key, lambda _: network_to_measure(checkpoint, self.component))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass(Part):
    """One backward pass of a component."""

    number: int
    """Of the sample."""

    @property
    def name(self) -> str:
        """Component and number."""
        return f"{self.component.value}, sample {self.number}"

    def leave(self, folder: Path) -> Notes:
        """Run it."""
        checkpoint = self.common.open()
        network = self.network(checkpoint)
        seed, latents = CASES[self.component][self.number]
        sample = sample_inputs(self.component, checkpoint.layout, seed=CALIBRATION_SEED + seed, latents=latents)
        layers = {layer: parameter_of(name) for layer, name in layers_to_measure(checkpoint, self.component).items()}
        found = curvatures_of(network, layers, sample, self.number)
        write_curvatures(folder / _FILE, found)
        return Notes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pricing(Part):
    """What every precision of some layers costs; a layer per processor, being too small to share."""

    layers: tuple[str, ...]
    scales: ScaleType

    @property
    def name(self) -> str:
        """Component, the first and the last layer, and how scales are stored."""
        return f"{self.component.value}, {self.layers[0]} to {self.layers[-1]}, scales {self.scales}"

    def leave(self, folder: Path) -> Notes:
        """Round them."""
        checkpoint = self.common.open()
        summed = self.common.find(_STAGE, self.key, Notes)
        if summed is None:
            raise _elsewhere(self.common)
        curvatures = read_curvatures(summed.file(_FILE))
        network = self.network(checkpoint)
        names, grids = layers_to_measure(checkpoint, self.component), all_grids(self.scales)

        def price(layer: str) -> LayerSensitivity:
            weight = network.get_parameter(parameter_of(names[layer]))
            return priced(weight.detach().numpy(), curvatures[layer], grids)

        prices = in_parallel(price, self.layers)
        (folder / _PRICED).write_bytes(_PRICES.dump_json(dict(zip(self.layers, prices, strict=True))))
        return Notes()


def measure(
    common: Common, component: Component, scales: ScaleType, tick: Tick, runner: Runner = in_this_process
) -> Sensitivity:
    """Return the sensitivities of a component, measured now or kept from before; an interrupted measurement resumes.

    Raises:
        Sa3Error: a pass came to no end, or what it found is not where this process looks for it.

    """
    key = _key(common.open(), component)
    kept = _file(common, component, key, scales)
    with contextlib.suppress(OSError, ValueError):
        return Sensitivity.model_validate_json(read_sealed(kept))
    layers: dict[str, LayerSensitivity] = {}
    try:
        _sum_up(common, component, key, runner, tick)
        for found in _finished(common, _pricings(common, component, key, scales), "rounding", runner, tick):
            layers |= _PRICES.validate_json(found.file(_PRICED).read_bytes())
    except (OSError, Sa3Error):
        # Another command that measures the same has removed its parts, which are ours too, because it has the whole.
        with contextlib.suppress(OSError, ValueError):
            return Sensitivity.model_validate_json(read_sealed(kept))
        raise
    sensitivity = Sensitivity(fingerprint=key, scales=scales, layers=layers)
    write_sealed(kept, sensitivity.model_dump_json(indent=1).encode())
    StageCache(common.cache).forget(key)
    return sensitivity


def to_measure(common: Common, component: Component, scales: ScaleType) -> list[Part]:
    """Return what `measure` would have to do."""
    key = _key(common.open(), component)
    with contextlib.suppress(OSError, ValueError):
        read_sealed(_file(common, component, key, scales))
        return []
    passes = [] if common.has(_STAGE, key, Notes) else _passes(common, component, key)
    parts = passes + _pricings(common, component, key, scales)
    return [one for one in parts if not common.has(*one.place)]


def _file(common: Common, component: Component, key: str, scales: ScaleType) -> Path:
    return common.cache / "sensitivity" / f"{component.value}-{key[:16]}-{scales}.json"


def _key(checkpoint: "Checkpoint", component: Component) -> str:
    keys = stage_keys(ComponentJob(checkpoint, component, ComponentRecipe(floor_db=1)))
    measuring = (sample_inputs, layers_to_measure, parameter_of, network_to_measure, curvatures_of, mean_of)
    code = code_digest(*measuring, priced, all_grids)
    return fingerprint(export=keys["export"], cases=CASES[component], code=code)


def _sum_up(common: Common, component: Component, key: str, runner: Runner, tick: Tick) -> None:
    """Leave the mean over samples in the cache, unless it is there."""
    if common.find(_STAGE, key, Notes) is not None:
        return

    def sum_up(folder: Path) -> Notes:
        write_curvatures(folder / _FILE, mean_of(read_curvatures(one.file(_FILE)) for one in passes))
        return Notes()

    try:
        passes = _finished(common, _passes(common, component, key), "measuring", runner, tick)
        common.found_or_made(_STAGE, key, Notes, lambda stages: stages.make(_STAGE, key, sum_up))
    except (OSError, Sa3Error):
        # See `measure`.
        if common.find(_STAGE, key, Notes) is None:
            raise
    StageCache(common.cache).forget(key)


def _finished(
    common: Common, parts: Sequence[Part], what: str, runner: Runner, tick: Tick
) -> list[CachedResult[Notes]]:
    """Return what each part has left, after all that are missing were done."""
    todo = [one for one in parts if common.find(*one.place) is None]
    try:
        with contextlib.closing(runner(todo, run_part)) as outcomes:
            for done in range(len(parts) - len(todo), len(parts)):
                tick(what, done, len(parts))
                _, outcome = next(outcomes)
                if isinstance(outcome, Sa3Error):
                    raise outcome
    finally:
        _held.close()
    tick(what, len(parts), len(parts))
    found = [one for part in parts if (one := common.find(*part.place)) is not None]
    if len(found) < len(parts):
        raise _elsewhere(common)
    return found


def _elsewhere(common: Common) -> InputError:
    return InputError(
        f"What was measured is not in {common.cache} here: workers must see the same folder, and nobody may empty it "
        "meanwhile. The same command measures what is missing."
    )


def _passes(common: Common, component: Component, key: str) -> list[Part]:
    weights = _float_bytes(common, component)
    # The weights may stand there twice, as they are stored and in the network.
    memory = 2 * weights + min(_BESIDE_WEIGHTS, _OF_TOYS + 4 * weights)
    takes = Estimate(1.0 + _SECONDS_PER_GIB * weights / 2**30, memory)
    return [
        Pass(common=common, component=component, key=key, takes=takes, number=number)
        for number in range(len(CASES[component]))
    ]


def _float_bytes(common: Common, component: Component) -> int:
    return 4 * sum(math.prod(entry.shape) for entry in common.open().stored(component).values())


def _pricings(common: Common, component: Component, key: str, scales: ScaleType) -> list[Part]:
    checkpoint = common.open()
    stored = checkpoint.stored(component)
    weights = layers_to_measure(checkpoint, component)
    memory = _OF_TOYS + _float_bytes(common, component)
    parts: list[Part] = []
    for first in range(0, len(weights), _LAYERS_AT_ONCE):
        layers = tuple(weights)[first : first + _LAYERS_AT_ONCE]
        numbers = sum(math.prod(stored[weights[layer]].shape[1:]) for layer in layers) * SAMPLED_ROWS
        takes = Estimate(_SECONDS_PER_LAYER * len(layers) + _SECONDS_PER_NUMBER * numbers, memory)
        parts.append(Pricing(common=common, component=component, key=key, takes=takes, layers=layers, scales=scales))
    return parts


def run_part(task: Part) -> None:
    """Find or make what a part finds, where this is called.

    Raises:
        BackendError: the measurement would be another one here.

    """
    if _key(task.common.open(), task.component) != task.key:
        raise BackendError(
            "A worker has another version of sa3-convert, torch or what exports networks, or another checkpoint under "
            "this path, than where the command was given. What it measures would be of something else."
        )
    if task.common.threads:
        torch.set_num_threads(task.common.threads)
    stage, key, notes = task.place
    task.common.found_or_made(stage, key, notes, lambda stages: stages.make(stage, key, task.leave))


def layers_to_measure(checkpoint: "Checkpoint", component: Component) -> dict[str, str]:
    """Return the stored name by layer name, as in a graph, of the weight of every linear and convolution.

    Of one with a weight norm it is the direction's.
    """
    found = {}
    for name, entry in checkpoint.stored(component).items():
        if name.endswith(_DIRECTION):
            found[f"{name.removesuffix(_DIRECTION)}.conv"] = name
        elif name.endswith(".weight") and len(entry.shape) >= 2 and name != TOKEN_TABLE:
            found[name.removesuffix(".weight")] = name
    return found


def network_to_measure(checkpoint: "Checkpoint", component: Component) -> nn.Module:
    """Build a network whose weight norms are fused: what is rounded is a parameter, by `parameter_of`."""
    network = build_network(component, checkpoint.layout, checkpoint.state(component))
    fuse_weight_norms(network)
    return network


def parameter_of(name: str) -> str:
    """Return what `network_to_measure` calls the weight that a checkpoint stores under this name."""
    return f"{name.removesuffix(_DIRECTION)}.weight" if name.endswith(_DIRECTION) else name
