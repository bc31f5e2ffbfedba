"""From a checkpoint and a size (or a fidelity) to a recipe: measure, allocate, write down."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.files import write_text
from sa3_convert.fingerprint import fingerprint, source_digest
from sa3_convert.networks.build import build_network
from sa3_convert.quantise.allocation import Allocation, allocate, smallest_for_error
from sa3_convert.quantise.calibrate import CALIBRATION_SEED, calibration_samples
from sa3_convert.quantise.calibration import collect_moments
from sa3_convert.quantise.moments import Moments
from sa3_convert.quantise.sensitivity import (
    LayerSensitivity,
    Sensitivity,
    all_grids,
    candidates,
    measure_gains,
)
from sa3_convert.recipe import ComponentRecipe, LayerRule, WeightScheme
from sa3_convert.stage_cache import StageCache
from sa3_convert.stages import export_stage, stage_keys
from sa3_convert.verify.inputs import sample_inputs

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

Tick = Callable[[str, int, int], None]
"""(what, done, of how many)."""

WORST_CASE_MARGIN_DB: Final = 6
"""A plan predicts the mean over inputs; a floor holds for the worst of them."""
_CASES: Final = {
    Component.TEXT_ENCODER: ((0, 0), (1, 0), (2, 0)),
    Component.NUMBER_CONDITIONER: tuple((seed, 0) for seed in range(8)),
    # Three noise levels of the sampler, from noise to almost clean.
    Component.DIT: ((0, 64), (1, 64), (2, 64)),
    Component.DECODER: ((0, 32),),
    Component.ENCODER: ((0, 32),),
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan has to reach: one of the two."""

    size: int | None = None
    """Bytes of the whole model."""
    snr_db: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A component's plan and its proof."""

    recipe: ComponentRecipe
    allocation: Allocation
    fixed_bytes: int
    """What is not a layer's weight: norms, biases, tables, constants."""

    @property
    def predicted_db(self) -> float:
        """Predicted signal-to-noise ratio at the component's output."""
        return _decibels(self.allocation.error)

    @property
    def bound_db(self) -> float:
        """No plan of this size is better than this, by the same measurements."""
        return _decibels(self.allocation.bound)


def measure(
    checkpoint: "Checkpoint", component: Component, cache: Path, tick: Tick, threads: int | None
) -> Sensitivity:
    """Return the sensitivities of a component, measured now or kept from before; an interrupted measurement resumes.

    Args:
        checkpoint: the checkpoint.
        component: which component.
        cache: folder of stage results; the reference is exported into it if it is not there yet.
        tick: told about progress.
        threads: for torch and ONNX Runtime.

    """
    keys = stage_keys(checkpoint, component, ComponentRecipe(floor_db=1))
    key = fingerprint(export=keys.export, code=source_digest("quantise", "verify/inputs"))
    kept = cache / "sensitivity" / f"{component.value}-{key[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return Sensitivity.model_validate_json(kept.read_text(encoding="utf-8"))
    if threads:
        torch.set_num_threads(threads)
    export, _ = StageCache(cache).get("export", keys.export, lambda folder: export_stage(checkpoint, component, folder))
    calibration = calibration_samples(component, checkpoint)
    done = 0

    def ran() -> None:
        nonlocal done
        done += 1
        tick("calibrating", done, 0)

    moments = collect_moments(export.file(f"{component.value}.onnx"), calibration, threads=threads, tick=ran)
    # Both factors are shares of a signal, so the moments count per unit of it; the scale cancels in gain · energy.
    gains = _gains(checkpoint, component, moments, kept.with_suffix(".partial"), tick)
    layers = _candidates(checkpoint, component, gains, moments, tick)
    sensitivity = Sensitivity(fingerprint=key, rounding="least_squares", layers=layers)
    write_text(kept, sensitivity.model_dump_json(indent=1))
    kept.with_suffix(".partial").unlink(missing_ok=True)
    return sensitivity


def plan_component(
    checkpoint: "Checkpoint", component: Component, base: ComponentRecipe, sensitivity: Sensitivity, target: Target
) -> Plan:
    """Return the best plan for a size, or the smallest for a fidelity.

    Raises:
        UsageError: no plan reaches the target.

    """
    shapes = {name: entry.shape for name, entry in checkpoint.stored(component).items()}
    weights = set(layers_to_measure(checkpoint, component).values())
    float_bytes = 2 if base.floats == "fp16" else 4
    fixed = sum(float_bytes * int(np.prod(shape)) for name, shape in shapes.items() if name not in weights)
    options = sensitivity.options()
    smallest = fixed + sum(min(option.size for option in choices) for choices in options.values())
    if target.size is not None and target.size < smallest:
        raise UsageError(
            f"No plan for {component.value} is smaller than {smallest / 2**20:.2f} MiB; "
            f"{target.size / 2**20:.2f} MiB were asked for."
        )
    if target.size is not None:
        allocation = allocate(options, target.size - fixed)
    elif target.snr_db is not None:
        allocation = smallest_for_error(options, 10 ** (-target.snr_db / 10))
    else:
        raise UsageError("Give a size (--target-mib) or a fidelity (--min-snr).")
    floor = max(1.0, round(_decibels(allocation.error) - WORST_CASE_MARGIN_DB, 1))
    recipe = base.model_copy(update={"weights": scheme_of(allocation), "floor_db": floor})
    return Plan(recipe, allocation, fixed)


def _decibels(error: float) -> float:
    """Return the signal-to-noise ratio of an error that is a share of the signal's energy; finite for none."""
    return -10 * float(np.log10(max(error, 1e-30)))


def scheme_of(allocation: Allocation) -> WeightScheme:
    """Return the allocation as a recipe's scheme: the commonest option, and one rule for each other one."""
    groups: dict[tuple[int | None, int | None], list[str]] = {}
    for layer, option in allocation.chosen.items():
        groups.setdefault((option.bits, option.block_size), []).append(layer)
    counts = Counter({key: len(layers) for key, layers in groups.items() if key[0] is not None})
    if not counts:
        raise UsageError("Every layer would stay in floating point; use a recipe without `weights`.")
    common = counts.most_common(1)[0][0]
    rules = tuple(
        LayerRule(match=exactly(layers), bits=bits, block_size=block)
        for (bits, block), layers in sorted(groups.items(), key=lambda item: str(item[0]))
        if (bits, block) != common
    )
    bits, block = common
    assert bits is not None
    return WeightScheme(bits=bits, block_size=block, rounding="least_squares", layers=rules)


def exactly(layers: Iterable[str]) -> str:
    """Return a regular expression that matches these names and no others."""
    return "^(" + "|".join(re.escape(layer) for layer in sorted(layers)) + ")$"


def layers_to_measure(checkpoint: "Checkpoint", component: Component) -> dict[str, str]:
    """Return the parameter name by layer name of every plain linear and convolution."""
    return {
        name.removesuffix(".weight"): name
        for name, entry in checkpoint.stored(component).items()
        if name.endswith(".weight") and len(entry.shape) >= 2 and not name.startswith("embed_tokens")
    }


def _candidates(
    checkpoint: "Checkpoint", component: Component, gains: Mapping[str, float], moments: Moments, tick: Tick
) -> dict[str, LayerSensitivity]:
    """Price every precision of every layer, a layer per processor: the tensors are too small to share one."""
    state = checkpoint.state(component)
    weights = layers_to_measure(checkpoint, component)
    threads = torch.get_num_threads()

    def priced(layer: str) -> LayerSensitivity:
        weight = state[weights[layer]].numpy()
        found = candidates(weight, gains[layer], moments.get(layer), all_grids())
        return LayerSensitivity(shape=tuple(weight.shape), gain=gains[layer], candidates=found)

    layers = {}
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for layer, sensitivity in zip(weights, pool.map(priced, weights), strict=True):
                layers[layer] = sensitivity
                tick("rounding", len(layers), len(weights))
    finally:
        torch.set_num_threads(threads)
    return layers


def _gains(
    checkpoint: "Checkpoint", component: Component, moments: Moments, partial: Path, tick: Tick
) -> dict[str, float]:
    """Measure each layer's gain, keeping every result at once so that nothing is measured twice."""
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(partial.read_text(encoding="utf-8"))
    weights = layers_to_measure(checkpoint, component)
    network = build_network(component, checkpoint.layout, checkpoint.state(component))
    samples = [
        sample_inputs(component, checkpoint.layout, seed=CALIBRATION_SEED + seed, latents=latents)
        for seed, latents in _CASES[component]
    ]
    missing = {layer: parameter for layer, parameter in weights.items() if layer not in known}
    for layer, gain in measure_gains(network, missing, moments, samples):
        known[layer] = gain
        write_text(partial, json.dumps(known))
        tick("measuring", len(known), len(weights))
    return {layer: known[layer] for layer in weights}
