"""A plan is made from measurements that are kept, meets its size, and its prediction holds where it is measured."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.inputs import sample_inputs
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.components import TOKEN_TABLE, Component
from sa3_convert.errors import UsageError
from sa3_convert.lab.common import Common
from sa3_convert.lab.planner.measuring import layers_to_measure, measure, network_to_measure, parameter_of
from sa3_convert.lab.planner.planner import Target, plan_component
from sa3_convert.lab.planner.sensitivity import Sensitivity
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.mnn.layer_rules import layer_name
from sa3_convert.networks.build import build_network
from sa3_convert.recipe import ComponentRecipe, Rounding, WeightScheme, load_recipe
from sa3_convert.rounding.grid import Grid, round_least_squares

BASE = ComponentRecipe(floor_db=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("planner") / "toy"
    synthesize(folder, "small-music", "toy", 0, "gaussian")
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planner-cache")


@pytest.fixture(scope="module")
def sensitivity(checkpoint: Checkpoint, kept: Path) -> Sensitivity:
    return measure(Common(checkpoint.folder, kept, threads=2), Component.TEXT_ENCODER, "fp16", lambda *_: None)


def test_every_layer_is_measured_at_every_precision(checkpoint: Checkpoint, sensitivity: Sensitivity) -> None:
    assert sensitivity.layers.keys() == layers_to_measure(checkpoint, Component.TEXT_ENCODER).keys()
    for layer in sensitivity.layers.values():
        assert layer.curvature > 0
        assert {candidate.bits for candidate in layer.candidates} == {None, 2, 3, 4, 5, 6, 7, 8}


def test_more_bits_cost_more_and_err_less(sensitivity: Sensitivity) -> None:
    for layer in sensitivity.layers.values():
        whole = sorted((c for c in layer.candidates if c.bits and c.block_size is None), key=lambda c: c.size)
        assert [c.bits for c in whole] == [2, 3, 4, 5, 6, 7, 8]
        assert all(first.error > second.error for first, second in itertools.pairwise(whole))


def test_a_second_plan_measures_nothing(checkpoint: Checkpoint, kept: Path, sensitivity: Sensitivity) -> None:
    ticks: list[str] = []
    again = measure(
        Common(checkpoint.folder, kept, threads=2),
        Component.TEXT_ENCODER,
        "fp16",
        lambda what, *_: ticks.append(what),
    )
    assert again == sensitivity
    assert ticks == []


def test_a_plan_fits_its_size_and_comes_near_its_prediction(checkpoint: Checkpoint, sensitivity: Sensitivity) -> None:
    component = Component.TEXT_ENCODER
    plan = plan_component(checkpoint, component, BASE, sensitivity, Target(size=250_000))
    assert plan.size <= 250_000
    assert plan.predicted_db <= plan.bound_db + 1e-6

    scheme = plan.recipe.weights
    assert scheme is not None
    state = checkpoint.state(component)
    for layer, parameter in layers_to_measure(checkpoint, component).items():
        bits, block = scheme.for_layer(layer)
        option = plan.allocation.chosen[re.escape(layer)]
        assert (bits, block) == (option.bits, option.block_size)
        if bits is not None:
            rounded = round_least_squares(state[parameter].numpy(), Grid(bits, False, block, half_scales=True))
            state[parameter] = state[parameter].new_tensor(rounded)
    reference = build_network(component, checkpoint.layout, checkpoint.state(component))
    target = build_network(component, checkpoint.layout, state)
    signal = noise = 0.0
    for seed in range(1000, 1003):
        sample = sample_inputs(component, checkpoint.layout, seed=seed, latents=0)
        feeds = [state["padding_embedding"].new_tensor(a, dtype=None) for a in sample.feeds.values()]
        feeds = [feed.int() for feed in feeds]
        region = sample.regions[0]
        expected, actual = (region.of(network(*feeds).numpy()) for network in (reference, target))
        signal += float(np.square(expected, dtype=np.float64).sum())
        noise += float(np.square(actual - expected, dtype=np.float64).sum())
    assert 10 * np.log10(signal / noise) == pytest.approx(plan.predicted_db, abs=2)


def test_a_size_that_cannot_be_is_refused_with_the_least_that_can(
    checkpoint: Checkpoint, sensitivity: Sensitivity
) -> None:
    with pytest.raises(UsageError, match="smaller than"):
        plan_component(checkpoint, Component.TEXT_ENCODER, BASE, sensitivity, Target(size=1000))


def test_a_fidelity_is_reached_by_prediction(checkpoint: Checkpoint, sensitivity: Sensitivity) -> None:
    plan = plan_component(checkpoint, Component.TEXT_ENCODER, BASE, sensitivity, Target(snr_db=25.0))
    assert plan.predicted_db >= 25.0


def test_the_written_recipe_is_one_that_convert_takes(
    checkpoint: Checkpoint, sensitivity: Sensitivity, tmp_path: Path
) -> None:
    int8 = load_recipe(Path(__file__).parents[3] / "configs" / "int8.yaml")
    plan = plan_component(checkpoint, Component.TEXT_ENCODER, BASE, sensitivity, Target(size=250_000))
    changed = int8.model_copy(update={"components": dict(int8.components) | {Component.TEXT_ENCODER: plan.recipe}})
    (tmp_path / "planned.yaml").write_text(changed.to_yaml())
    assert load_recipe(tmp_path / "planned.yaml").components[Component.TEXT_ENCODER] == plan.recipe


def test_the_token_table_is_counted_as_the_recipe_stores_it(checkpoint: Checkpoint, sensitivity: Sensitivity) -> None:
    target, rows, width = Target(snr_db=8.0), *checkpoint.stored(Component.TEXT_ENCODER)[TOKEN_TABLE].shape
    plans = {
        kind: plan_component(
            checkpoint, Component.TEXT_ENCODER, BASE.model_copy(update={"embedding": kind}), sensitivity, target
        )
        for kind in ("float", "int8", "int4")
    }
    fixed = {kind: plan.fixed_bytes for kind, plan in plans.items()}
    assert fixed["float"] - fixed["int8"] == 3 * rows * width - 4 * rows
    assert fixed["int8"] - fixed["int4"] == rows * width // 2
    errors = [plan.fixed_error for plan in plans.values()]
    assert errors == sorted(errors)
    for plan in plans.values():
        assert plan.predicted_db == pytest.approx(-10 * np.log10(plan.fixed_error + plan.allocation.error))
        assert plan.predicted_db >= 8.0
    base = BASE.model_copy(update={"embedding": "int4"})
    with pytest.raises(UsageError, match="No plan is that close"):
        plan_component(checkpoint, Component.TEXT_ENCODER, base, sensitivity, Target(snr_db=40.0))


@pytest.mark.parametrize("component", Component)
def test_every_layer_that_a_graph_has_is_measured_by_its_name(
    checkpoint: Checkpoint, toy_int8: Bundle, component: Component
) -> None:
    stored = read_storage(toy_int8.file(component))
    layers = {layer_name(operator.name) for operator, _ in stored.weighted()}
    assert layers == layers_to_measure(checkpoint, component).keys()


def test_a_weight_norm_is_fused_before_it_is_measured(checkpoint: Checkpoint, tmp_path: Path) -> None:
    layer = "decoder.layers.3.mapping.conv"
    found = measure(Common(checkpoint.folder, tmp_path, threads=1), Component.DECODER, "fp16", lambda *_: None)
    mapping = found.layers[layer]
    network = network_to_measure(checkpoint, Component.DECODER)
    weight = network.get_parameter(parameter_of(layers_to_measure(checkpoint, Component.DECODER)[layer]))
    assert mapping.shape == tuple(weight.shape)
    # All that the decoder makes comes out of it: noise of 1 % of its norm is about 1 % of the output's.
    share = mapping.curvature * float(weight.square().mean()) * 1e-4
    assert -43 < 10 * math.log10(share) < -37


@pytest.mark.parametrize(
    ("asked", "planned"),
    [("converter", "least_squares"), ("least_squares", "least_squares"), ("error_compensated", "error_compensated")],
)
def test_a_plan_keeps_compensated_rounding(
    checkpoint: Checkpoint, sensitivity: Sensitivity, asked: Rounding, planned: Rounding
) -> None:
    base = BASE.model_copy(update={"weights": WeightScheme(bits=8, rounding=asked)})
    plan = plan_component(checkpoint, Component.TEXT_ENCODER, base, sensitivity, Target(snr_db=25.0))
    assert plan.recipe.weights is not None
    assert plan.recipe.weights.rounding == planned


def test_layers_of_a_role_get_one_precision(checkpoint: Checkpoint, sensitivity: Sensitivity) -> None:
    plan = plan_component(checkpoint, Component.TEXT_ENCODER, BASE, sensitivity, Target(size=250_000), "role")
    free = plan_component(checkpoint, Component.TEXT_ENCODER, BASE, sensitivity, Target(size=250_000))
    assert plan.size <= 250_000
    assert plan.predicted_db <= free.bound_db
    assert len(plan.layers) < len(sensitivity.layers)
    scheme = plan.recipe.weights
    assert scheme is not None
    for pattern, layers in plan.layers.items():
        option = plan.allocation.chosen[pattern]
        assert {scheme.for_layer(layer) for layer in layers} == {(option.bits, option.block_size)}


def test_a_changed_digit_in_kept_measurements_is_measured_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    component, common = Component.NUMBER_CONDITIONER, Common(checkpoint.folder, tmp_path, threads=1)
    made = measure(common, component, "fp16", lambda *_: None)
    (kept,) = tmp_path.glob("sensitivity/*.json")
    kept.write_text(kept.read_text().replace('"error": ', '"error": 1', 1))
    ticks: list[object] = []
    assert measure(common, component, "fp16", lambda *tick: ticks.append(tick)) == made
    assert ticks
    ticks.clear()
    assert measure(common, component, "fp16", lambda *tick: ticks.append(tick)) == made
    assert not ticks


def test_kept_floating_point_costs_what_the_recipe_stores_it_as(sensitivity: Sensitivity) -> None:
    layer = next(iter(sensitivity.layers.values()))
    (half,) = (option for option in layer.options("fp16") if option.bits is None)
    (single,) = (option for option in layer.options("fp32") if option.bits is None)
    assert single.size == 2 * half.size == 4 * int(np.prod(layer.shape))
    assert half.error >= single.error == 0
