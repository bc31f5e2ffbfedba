"""The tiers with mixed precision fit every variant by the names and widths of its layers, and convert."""

import re
from pathlib import Path

import pytest

from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.components import Component
from sa3_convert.plan import estimate_model_bytes
from sa3_convert.quantise.grid import Grid
from sa3_convert.recipe import WeightScheme, load_recipe
from tests.bundles import CONFIGS, Convert

TIERS = ["balanced", "small"]
MIXED = [Component.DIT, Component.DECODER, Component.ENCODER]


@pytest.fixture(scope="module", params=["small-music", "small-sfx", "small-music-base", "medium"])
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiers") / request.param
    synthesize(folder, request.param, "toy", 0, "gaussian")
    return Checkpoint.open(folder)


def layers(checkpoint: Checkpoint, component: Component) -> dict[str, tuple[int, ...]]:
    """Return the shapes of weights by layer name, those with a norm of their own included."""
    return {
        re.sub(r"\.weight(_v)?$", "", name): entry.shape
        for name, entry in checkpoint.stored(component).items()
        if re.search(r"\.weight(_v)?$", name) and len(entry.shape) >= 2
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
    names, mixed = layers(variant, component), scheme(tier, component)
    for rule in mixed.layers:
        assert any(re.search(rule.match, name) for name in names), rule.match
    for name, shape in names.items():
        bits, block = mixed.for_layer(name)
        if bits is not None and block is not None:
            assert shape[1] % block == 0, name
            assert Grid(bits, False, block).group_length(shape) <= block * (shape[2] if len(shape) > 2 else 1), name


def test_smaller_tiers_are_smaller(variant: Checkpoint) -> None:
    for component in MIXED:
        shapes = {name: entry.shape for name, entry in variant.stored(component).items()}
        recipes = [load_recipe(CONFIGS / f"{tier}.yaml").for_component(component) for tier in TIERS]
        balanced, small = (estimate_model_bytes(shapes, recipe) for recipe in recipes)
        assert small < balanced


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_converts_and_keeps_its_floors(converted: Convert, toy: Path, tmp_path: Path, tier: str) -> None:
    bundle = converted(toy, tier, tmp_path / "out")[0].bundle
    assert set(bundle.components) >= set(MIXED)
    for component in bundle.components:
        artifact = bundle.artifact(component)
        assert artifact.fidelity is not None
        assert artifact.floor_db is not None
        assert artifact.fidelity.signal_to_noise_db >= artifact.floor_db
