"""From a checkpoint and a size (or a fidelity) to a recipe: measure, allocate, write down."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch

from sa3_convert.check.inputs import sample_inputs
from sa3_convert.components import TOKEN_TABLE, Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.planner.allocation import Allocation, Option, allocate, smallest_for_error
from sa3_convert.lab.planner.measuring import CASES, layers_to_measure
from sa3_convert.lab.planner.sensitivity import Sensitivity
from sa3_convert.networks.build import build_network
from sa3_convert.recipe import ComponentRecipe, LayerRule, Rounding, ScaleType, WeightScheme
from sa3_convert.rounding.network import CALIBRATION_SEED, stored_embedding

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

By = Literal["layer", "role"]
"""What gets one precision: a layer, or all layers whose names differ in numbers only."""

WORST_CASE_MARGIN_DB: Final = 6
"""A plan predicts the mean over inputs; a floor holds for the worst of them."""
_GRAPH_BYTES: Final = (6144, 1800)
"""Of a file, and for each tensor of the checkpoint, beside these: operators, names, constants of rotations and padding.
Measured 1100 to 2000 a tensor, miniature and true size, and up to 5000 of the number conditioner's two; a size that is
asked for is what a file must not exceed."""
_TABLE_CASES: Final = 4


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan has to reach: one of the two."""

    size: int | None = None
    """Bytes of the whole model."""
    snr_db: float | None = None


@dataclass(frozen=True, slots=True)
class BitPlan:
    """A component's plan and its proof."""

    recipe: ComponentRecipe
    allocation: Allocation
    """By regular expression: what `recipe` calls a layer, or a role."""
    layers: Mapping[str, Sequence[str]]
    """Which layers each of the allocation's keys stands for."""
    fixed_bytes: int
    """What is not a layer's weight: norms, biases, tables, constants."""
    fixed_error: float = 0.0
    """Energy of the error that a token table causes, as a share of the output's."""

    @property
    def predicted_db(self) -> float:
        """Predicted signal-to-noise ratio at the component's output."""
        return _decibels(self.fixed_error + self.allocation.error)

    @property
    def bound_db(self) -> float:
        """No plan of this size is better than this, by the same measurements."""
        return _decibels(self.fixed_error + self.allocation.bound)

    @property
    def size(self) -> int:
        """Predicted bytes of the whole model."""
        return self.allocation.size + self.fixed_bytes


def plan_component(
    checkpoint: "Checkpoint",
    component: Component,
    base: ComponentRecipe,
    sensitivity: Sensitivity,
    target: Target,
    by: By = "layer",
    fixed_error: float | None = None,
) -> BitPlan:
    """Return the best plan for a size, or the smallest for a fidelity; what its table costs is measured if not given.

    Raises:
        UsageError: no plan is so small, or so faithful.

    """
    if fixed_error is None:
        fixed_error = table_error(checkpoint, base) if component is Component.TEXT_ENCODER else 0.0
    fixed = bytes_beside(checkpoint, component, base)
    groups = layers_by_pattern(sensitivity.layers, by)
    options = options_by_pattern(groups, sensitivity, base)
    smallest = fixed + sum(min(option.size for option in choices) for choices in options.values())
    if target.size is not None and target.size < smallest:
        raise UsageError(
            f"No plan for {component.value} is smaller than {smallest / 2**20:.2f} MiB; "
            f"{target.size / 2**20:.2f} MiB were asked for."
        )
    if target.size is not None:
        allocation = allocate(options, target.size - fixed)
    elif target.snr_db is not None:
        allocation = smallest_for_error(options, 10 ** (-target.snr_db / 10) - fixed_error)
    else:
        raise UsageError("Give a size (--target-mib) or a fidelity (--min-snr).")
    floor = max(1.0, round(_decibels(fixed_error + allocation.error) - WORST_CASE_MARGIN_DB, 1))
    rounding: Rounding = "error_compensated" if base.compensates else "least_squares"
    scheme = scheme_of(allocation, groups, sensitivity.scales, rounding)
    recipe = base.model_copy(update={"weights": scheme, "floor_db": floor})
    return BitPlan(recipe, allocation, groups, fixed, fixed_error)


def bytes_beside(checkpoint: "Checkpoint", component: Component, base: ComponentRecipe) -> int:
    """Return the bytes of all that is not a layer's weight, and of the graph, which is counted a little large.

    MNN gives a bias of zeros to each layer without one.
    """
    shapes = {name: entry.shape for name, entry in checkpoint.stored(component).items()}
    of_file, of_tensor = _GRAPH_BYTES
    graph = of_file + of_tensor * len(shapes)
    layers = layers_to_measure(checkpoint, component)
    table = shapes.pop(TOKEN_TABLE, (0, 0))
    # Norms and biases stay float32 in every file; magnitudes are in none.
    kept = sum(
        (base.float_bytes if len(shape) > 1 else 4) * math.prod(shape)
        for name, shape in shapes.items()
        if name not in layers.values() and not name.endswith(".weight_g")
    )
    biases = sum(4 * shapes[name][0] for name in layers.values() if f"{name.rpartition('.')[0]}.bias" not in shapes)
    return kept + biases + base.table_bytes(table[0], table[1]) + graph


def table_error(checkpoint: "Checkpoint", base: ComponentRecipe) -> float:
    """Return the energy of the error, as a share of the output's, that a recipe's token table causes by itself."""
    component = Component.TEXT_ENCODER
    network = build_network(component, checkpoint.layout, checkpoint.state(component))
    shares = []
    for seed, _ in CASES[component][:_TABLE_CASES]:
        sample = sample_inputs(component, checkpoint.layout, seed=CALIBRATION_SEED + seed, latents=0)
        feeds = [torch.from_numpy(np.ascontiguousarray(array)) for array in sample.feeds.values()]
        with torch.no_grad():
            expected = sample.regions[0].of(network(*feeds).numpy())
            with stored_embedding(network, base):
                actual = sample.regions[0].of(network(*feeds).numpy())
        shares.append(float(np.square(actual - expected).sum() / np.square(expected).sum()))
    return sum(shares) / len(shares)


def _decibels(error: float) -> float:
    """Return the signal-to-noise ratio of an error that is a share of the signal's energy; finite for none."""
    return -10 * float(np.log10(max(error, 1e-30)))


def layers_by_pattern(layers: Mapping[str, object], by: By) -> dict[str, list[str]]:
    """Return which layers get one precision, by a regular expression for exactly their names (without anchors)."""
    groups = defaultdict(list)
    for layer in layers:
        pattern = re.escape(layer)
        groups[re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", pattern) if by == "role" else pattern].append(layer)
    return dict(groups)


def options_by_pattern(
    groups: Mapping[str, Sequence[str]], sensitivity: Sensitivity, base: ComponentRecipe
) -> dict[str, list[Option]]:
    """Return what `allocation.allocate` chooses from: for each pattern the options that all of its layers have."""
    return {
        pattern: combined([sensitivity.layers[layer].options(base.floats) for layer in layers])
        for pattern, layers in groups.items()
    }


def combined(choices: Sequence[Sequence[Option]]) -> list[Option]:
    """Return the options that all layers of a group have: sizes and errors add up."""
    found: dict[tuple[int | None, int | None], list[Option]] = defaultdict(list)
    for options in choices:
        for option in options:
            found[option.bits, option.block_size].append(option)
    return [
        Option(bits, block, sum(option.size for option in same), sum(option.error for option in same))
        for (bits, block), same in found.items()
        if len(same) == len(choices)
    ]


def scheme_of(
    allocation: Allocation,
    layers: Mapping[str, Sequence[str]],
    scales: ScaleType,
    rounding: Rounding,
) -> WeightScheme | None:
    """Return the allocation as a recipe's scheme: the commonest option, and one rule for each other one.

    None where every layer stays in floating point.
    """
    patterns: dict[tuple[int | None, int | None], list[str]] = defaultdict(list)
    for pattern, option in allocation.chosen.items():
        patterns[option.bits, option.block_size].append(pattern)
    counts = Counter(
        {key: sum(len(layers[pattern]) for pattern in same) for key, same in patterns.items() if key[0] is not None}
    )
    if not counts:
        return None
    common = counts.most_common(1)[0][0]
    rules = tuple(
        LayerRule(match=f"^({'|'.join(sorted(same))})$", bits=bits, block_size=block)
        for (bits, block), same in sorted(patterns.items(), key=lambda item: str(item[0]))
        if (bits, block) != common
    )
    bits, block = common
    assert bits is not None
    return WeightScheme(bits=bits, block_size=block, rounding=rounding, scales=scales, layers=rules)
