"""The sensitivities of a component: a backward pass for each sample, wherever it runs, then every precision's price.

Passes leave what they find, tens of MB, in the stage cache, under a hash of all that it depends on. It is
added up in the order of the samples, so nothing depends on where a pass ran, or on which was done first.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from pydantic import TypeAdapter
from torch import nn

from sa3_convert.check.inputs import sample_inputs
from sa3_convert.components import TOKEN_TABLE, Component
from sa3_convert.convert.cache import UNFINISHED, Notes, StageCache
from sa3_convert.convert.code_digest import code_digest
from sa3_convert.convert.plan import stage_keys
from sa3_convert.convert.stages import ComponentJob
from sa3_convert.errors import BackendError, InputError, Sa3Error
from sa3_convert.lab.common import Common
from sa3_convert.lab.planner.sensitivity import (
    Curvatures,
    LayerSensitivity,
    Sensitivity,
    all_grids,
    curvatures_of,
    mean_of,
    priced,
    read_curvatures,
    write_curvatures,
)
from sa3_convert.networks.build import build_network
from sa3_convert.recipe import ComponentRecipe, ScaleType
from sa3_convert.rounding.grid import one_thread
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
_STAGE: Final = "curvature"
_FILE: Final = "curvature.safetensors"
_PRICES: Final = TypeAdapter(dict[str, LayerSensitivity])
_SECONDS_PER_GIB: Final = 20.0
"""Of a backward pass, on two cores."""
_BESIDE_WEIGHTS: Final = 3 << 30
"""Bytes of activations, gradients and the process, of true-size components."""
_OF_TOYS: Final = 600 << 20
_held = Latest[tuple[Common, Component], nn.Module]()


@dataclass(frozen=True, slots=True)
class Pass:
    """One backward pass of a component."""

    common: Common
    component: Component
    number: int
    """Of the sample."""
    key: str
    """Of the measurement."""
    takes: Estimate
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Component and number."""
        return f"{self.component.value}, sample {self.number}"

    @property
    def part(self) -> tuple[str, str, type[Notes]]:
        """Where what it finds has its place in the cache."""
        return f"{UNFINISHED}/{self.key}", fingerprint(sample=self.number), Notes


def measure(
    common: Common, component: Component, scales: ScaleType, tick: Tick, runner: Runner = in_this_process
) -> Sensitivity:
    """Return the sensitivities of a component, measured now or kept from before; an interrupted measurement resumes.

    Raises:
        Sa3Error: a pass came to no end, or what it found is not where this process looks for it.

    """
    checkpoint = common.open()
    key = _key(checkpoint, component)
    kept = common.cache / "sensitivity" / f"{component.value}-{key[:16]}-{scales}.json"
    with contextlib.suppress(OSError, ValueError):
        return Sensitivity.model_validate_json(read_sealed(kept))
    if common.threads:
        torch.set_num_threads(common.threads)
    curvatures = _curvatures(common, component, key, runner, tick)
    layers = _priced(checkpoint, component, scales, curvatures, kept.with_suffix(".partial"), tick)
    sensitivity = Sensitivity(fingerprint=key, scales=scales, layers=layers)
    write_sealed(kept, sensitivity.model_dump_json(indent=1).encode())
    kept.with_suffix(".partial").unlink(missing_ok=True)
    return sensitivity


def _key(checkpoint: "Checkpoint", component: Component) -> str:
    keys = stage_keys(ComponentJob(checkpoint, component, ComponentRecipe(floor_db=1)))
    code = code_digest(sample_inputs, layers_to_measure, curvatures_of, mean_of, _priced)
    return fingerprint(export=keys["export"], cases=CASES[component], code=code)


def _curvatures(common: Common, component: Component, key: str, runner: Runner, tick: Tick) -> Curvatures:
    """Return the mean over samples, added up now or kept from before; parts stay until it is there."""
    stages = StageCache(common.cache)
    found = stages.find(_STAGE, key, Notes)
    if found is None:
        passes = _passes(common, component, key)
        todo = [one for one in passes if common.find(*one.part) is None]
        try:
            with contextlib.closing(runner(todo, run_pass)) as outcomes:
                for done in range(len(passes) - len(todo), len(passes)):
                    tick("measuring", done, len(passes))
                    _, outcome = next(outcomes)
                    if isinstance(outcome, Sa3Error):
                        raise outcome
        finally:
            _held.close()
        tick("measuring", len(passes), len(passes))
        found = stages.make(_STAGE, key, partial(_added_up, passes))
        stages.forget(key)
    return read_curvatures(found.file(_FILE))


def _passes(common: Common, component: Component, key: str) -> list[Pass]:
    shapes = (entry.shape for entry in common.open().stored(component).values())
    weights = 4 * sum(math.prod(shape) for shape in shapes)
    # The weights may stand there twice, as they are stored and in the network.
    memory = 2 * weights + min(_BESIDE_WEIGHTS, _OF_TOYS + 4 * weights)
    takes = Estimate(1.0 + _SECONDS_PER_GIB * weights / 2**30, memory)
    return [Pass(common, component, number, key, takes) for number in range(len(CASES[component]))]


def run_pass(task: Pass) -> None:
    """Find or make what one pass finds, where this is called.

    Raises:
        BackendError: the measurement would be another one here.

    """
    if _key(task.common.open(), task.component) != task.key:
        raise BackendError(
            "A worker has another version of sa3-convert, torch or what exports networks, or another checkpoint under "
            "this path, than where the command was given. What it measures would be of something else."
        )
    task.common.found_or_made(*task.part, lambda stages: stages.make(*task.part[:2], partial(_left, task)))


def _left(task: Pass, folder: Path) -> Notes:
    """Run one pass and leave what it finds in a folder."""
    common, component = task.common, task.component
    checkpoint = common.open()
    if common.threads:
        torch.set_num_threads(common.threads)
    network = _held.of(
        (common, component), lambda _: build_network(component, checkpoint.layout, checkpoint.state(component))
    )
    seed, latents = CASES[component][task.number]
    sample = sample_inputs(component, checkpoint.layout, seed=CALIBRATION_SEED + seed, latents=latents)
    found = curvatures_of(network, layers_to_measure(checkpoint, component), sample, task.number)
    write_curvatures(folder / _FILE, found)
    return Notes()


def _added_up(passes: Sequence[Pass], folder: Path) -> Notes:
    """Leave the mean of what passes have found in a folder."""

    def parts() -> Iterator[Curvatures]:
        for one in passes:
            found = one.common.find(*one.part)
            if found is None:
                raise InputError(
                    f"What was measured is not in {one.common.cache} here: workers must see the same folder, and "
                    "nobody may empty it meanwhile. The same command measures what is missing."
                )
            yield read_curvatures(found.file(_FILE))

    write_curvatures(folder / _FILE, mean_of(parts()))
    return Notes()


def layers_to_measure(checkpoint: "Checkpoint", component: Component) -> dict[str, str]:
    """Return the parameter name by layer name of every plain linear and convolution."""
    return {
        name.removesuffix(".weight"): name
        for name, entry in checkpoint.stored(component).items()
        if name.endswith(".weight") and len(entry.shape) >= 2 and name != TOKEN_TABLE
    }


def _priced(
    checkpoint: "Checkpoint", component: Component, scales: ScaleType, curvatures: Curvatures, partial: Path, tick: Tick
) -> dict[str, LayerSensitivity]:
    """Price every precision of every layer, keeping each at once; a layer per processor, being too small to share."""
    layers = _kept_prices(partial)
    state = checkpoint.state(component)
    weights = layers_to_measure(checkpoint, component)
    missing = [layer for layer in weights if layer not in layers]
    with one_thread() as threads, ThreadPoolExecutor(threads) as pool:
        work = pool.map(
            lambda layer: priced(state[weights[layer]].numpy(), curvatures[layer], all_grids(scales)), missing
        )
        for layer, sensitivity in zip(missing, work, strict=True):
            layers[layer] = sensitivity
            write_sealed(partial, _PRICES.dump_json(layers))
            tick("rounding", len(layers), len(weights))
    return {layer: layers[layer] for layer in weights}


def _kept_prices(partial: Path) -> dict[str, LayerSensitivity]:
    """Return what an interrupted run left; nothing if that is of no use."""
    try:
        return _PRICES.validate_json(read_sealed(partial))
    except (OSError, ValueError):
        return {}
