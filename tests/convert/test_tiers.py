"""The tiers with mixed precision fit every variant by the names and widths of its layers, and convert."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.components import TOKEN_TABLE, Component
from sa3_convert.convert.plan import estimate_model_bytes
from sa3_convert.recipe import WeightScheme, load_recipe
from sa3_convert.rounding.grid import Grid
from tests.bundles import CONFIGS, Convert
from tests.networks.test_true_size import layout_of_published, published_state

TIERS = ["balanced", "small"]
MIXED = [Component.DIT, Component.DECODER, Component.ENCODER]


@pytest.fixture(scope="module", params=["small-music", "small-sfx", "small-music-base", "medium"])
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiers") / request.param
    synthesize(folder, request.param, "toy", 0, "gaussian")
    return Checkpoint.open(folder)


def layers(checkpoint: Checkpoint, component: Component) -> dict[str, tuple[int, ...]]:
    """Return the shapes of weights by layer name, those with a norm of their own included."""
    return weights_by_layer({name: entry.shape for name, entry in checkpoint.stored(component).items()})


def weights_by_layer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        re.sub(r"\.weight(_v)?$", "", name): shape
        for name, shape in shapes.items()
        if re.search(r"\.weight(_v)?$", name) and len(shape) >= 2
    }


def scheme(tier: str, component: Component) -> WeightScheme:
    found = load_recipe(CONFIGS / f"{tier}.yaml").for_component(component).weights
    assert found is not None
    return found


@pytest.mark.parametrize("component", MIXED)
@pytest.mark.parametrize("tier", TIERS)
def test_every_rule_has_layers_and_every_block_divides_their_inputs(
    variant: Checkpoint, tier: str, component: Component
) -> None:
    check_rules(layers(variant, component), scheme(tier, component))


def check_rules(names: Mapping[str, tuple[int, ...]], mixed: WeightScheme) -> None:
    for rule in mixed.layers:
        assert any(re.search(rule.match, name) for name in names), rule.match
    for name, shape in names.items():
        bits, block = mixed.for_layer(name)
        if bits is not None and block is not None:
            assert shape[1] % block == 0, name
            assert Grid(bits, False, block).group_length(shape) <= block * (shape[2] if len(shape) > 2 else 1), name


@pytest.mark.parametrize(
    ("tier", "variant_name"),
    [
        ("int8", "small-music"),
        ("int4", "small-music"),
        ("balanced", "small-music"),
        ("small", "small-music"),
        ("medium", "medium"),
    ],
)
def test_at_the_published_size_every_rule_has_layers_and_every_block_divides_their_inputs(
    tier: str, variant_name: str, tmp_path: Path
) -> None:
    layout = layout_of_published(variant_name, tmp_path)
    for component, recipe in load_recipe(CONFIGS / f"{tier}.yaml").components.items():
        state = published_state(layout, component)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name != TOKEN_TABLE}
        assert recipe.weights is not None
        check_rules(weights_by_layer(shapes), recipe.weights)


@pytest.mark.parametrize(
    ("tier", "variant_name", "component", "mebibytes"),
    [
        ("int8", "small-music", Component.TEXT_ENCODER, 276),
        ("int4", "small-music", Component.TEXT_ENCODER, 240),
        ("int8", "small-music", Component.DIT, 444),
        ("int8", "medium", Component.DIT, 1400),
        ("medium", "medium", Component.DIT, 1400),
        ("medium", "medium", Component.DECODER, 412),
        ("medium", "medium", Component.ENCODER, 412),
    ],
)
def test_sizes_that_are_promised(
    tier: str, variant_name: str, component: Component, mebibytes: int, tmp_path: Path
) -> None:
    state = published_state(layout_of_published(variant_name, tmp_path), component)
    recipe = load_recipe(CONFIGS / f"{tier}.yaml").for_component(component)
    size = estimate_model_bytes({name: tuple(tensor.shape) for name, tensor in state.items()}, recipe) / 2**20
    assert 0.97 * mebibytes < size <= mebibytes


def test_smaller_tiers_are_smaller(variant: Checkpoint) -> None:
    for component in MIXED:
        shapes = {name: entry.shape for name, entry in variant.stored(component).items()}
        recipes = [load_recipe(CONFIGS / f"{tier}.yaml").for_component(component) for tier in TIERS]
        balanced, small = (estimate_model_bytes(shapes, recipe) for recipe in recipes)
        assert small < balanced


def test_of_the_text_encoders_weights_most_have_four_bits_or_fewer(tmp_path: Path) -> None:
    state = published_state(layout_of_published("small-music", tmp_path), Component.TEXT_ENCODER)
    shapes = weights_by_layer({name: tuple(tensor.shape) for name, tensor in state.items() if name != TOKEN_TABLE})
    mixed = scheme("int4", Component.TEXT_ENCODER)
    few = sum(math.prod(shape) for name, shape in shapes.items() if (mixed.for_layer(name)[0] or 16) <= 4)
    assert few / sum(math.prod(shape) for shape in shapes.values()) > 0.55


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_converts_and_keeps_its_floors(converted: Convert, toy: Path, tmp_path: Path, tier: str) -> None:
    bundle = converted(toy, tier, tmp_path / "out")[0].bundle
    assert set(bundle.components) >= set(MIXED)
    for component in bundle.components:
        artifact = bundle.artifact(component)
        assert artifact.fidelity is not None
        assert artifact.floor_db is not None
        assert artifact.fidelity.signal_to_noise_db >= artifact.floor_db


def test_int4_keeps_its_text_encoder_above_16_db(converted: Convert, toy: Path, tmp_path: Path) -> None:
    only = (Component.TEXT_ENCODER,)
    artifact = converted(toy, "int4", tmp_path / "out", components=only)[0].bundle.artifact(*only)
    assert artifact.precision == "int4"
    assert artifact.fidelity is not None
    assert artifact.fidelity.signal_to_noise_db > 16
