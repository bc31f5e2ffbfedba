"""Recipes: strict, explained, the same after a round trip; and the ones in configs/ say what they are called."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sa3_convert.components import SPECS, Component
from sa3_convert.errors import RecipeError
from sa3_convert.recipe import ComponentRecipe, LayerRule, Recipe, WeightScheme, load_recipe

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def data(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "mine",
        "description": "for a test",
        "components": {"dit": {"weights": {"bits": 8}, "floor_db": 30}},
    } | changes


def write(folder: Path, content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def dit(**settings: Any) -> dict[str, Any]:
    return data(components={"dit": {"floor_db": 30} | settings})


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_of_the_project_covers_all_components_and_bears_its_files_name(name: str) -> None:
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    assert recipe.name == name
    assert set(recipe.components) == set(Component)


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_the_float_recipes_quantise_nothing() -> None:
    for name, kind in (("fp32", "fp32"), ("fp16", "fp16")):
        recipe = load_recipe(CONFIGS / f"{name}.yaml")
        assert {(part.weights, part.floats, part.precision) for part in recipe.components.values()} == {
            (None, kind, kind)
        }


def test_the_card_recipe_is_what_the_card_says() -> None:
    recipe = load_recipe(CONFIGS / "card.yaml")
    assert {c.value: (r.precision, r.floats) for c, r in recipe.components.items()} == {
        "text_encoder": ("int4", "fp16"),
        "number_conditioner": ("int8", "fp32"),
        "dit": ("int8", "fp32"),
        "decoder": ("int8", "fp32"),
        "encoder": ("int8", "fp32"),
    }


def test_defaults_are_written_out_in_the_resolved_recipe(tmp_path: Path) -> None:
    resolved = yaml.safe_load(load_recipe(write(tmp_path, data())).to_yaml())
    assert resolved["schema"] == 1
    assert resolved["components"]["dit"] == {
        "weights": {
            "bits": 8,
            "symmetric": False,
            "block_size": None,
            "rounding": "converter",
            "scales": "fp32",
            "layers": [],
        },
        "floats": "fp32",
        "embedding": "float",
        "floor_db": 30.0,
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (data(descripton="x"), "descripton: unknown key; perhaps you meant 'description'"),
        (data(zzzzzz=1), "zzzzzz: unknown key$"),
        (dit(wieghts={"bits": 8}), r"components\.dit\.wieghts: unknown key; perhaps you meant 'weights'"),
        (dit(weights={"bit": 8}), r"components\.dit\.weights\.bit: unknown key; perhaps you meant 'bits'"),
        (
            dit(weights={"bits": 8, "layers": [{"match": "x", "bits": 4, "blocksize": 32}]}),
            r"layers\.0\.blocksize: unknown key; perhaps you meant 'block_size'",
        ),
        (dit(weights={"bits": 1}), r"weights\.bits"),
        (dit(weights={"bits": 9}), r"weights\.bits"),
        (dit(weights={"bits": 8, "block_size": 24}), "24 is not a multiple of 16"),
        (dit(weights={"bits": 8, "block_size": 0}), "0 is not a multiple of 16"),
        (dit(weights={"bits": 8, "layers": [{"match": "(", "bits": 4}]}), "not a regular expression"),
        (dit(weights={"bits": 8, "layers": [{"match": "x"}]}), r"layers\.0\.bits"),
        (dit(weights={"bits": 8, "rounding": "best"}), r"weights\.rounding"),
        (dit(weights={}), r"weights\.bits"),
        (dit(floats="bf16"), r"dit\.floats"),
        (dit(embedding="int8"), "only text_encoder has an embedding"),
        (dit(floor_db=0), r"dit\.floor_db"),
        (dit(floor_db=float("inf")), r"dit\.floor_db"),
        (dit(floor_db=float("nan")), r"dit\.floor_db"),
        (data(components={"dit": {}}), r"dit\.floor_db"),
        (data(components={"unet": {"floor_db": 30}}), r"components\.unet"),
        (data(schema=2), "schema"),
        (data(name="Mine!"), "name"),
        ({}, "schema"),
        ([], "recipe"),
        ("", "recipe"),
        ("a: [", "cannot be read"),
        ("name: 2024-13-45", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("a: !!python/object:os.system x", "cannot be read"),
    ],
)
def test_what_is_not_valid_is_refused_where_it_stands(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=f"(?m){said}") as caught:
        load_recipe(write(tmp_path, content))
    assert caught.value.exit_code == 3
    assert "recipe.yaml" in str(caught.value)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, data(schema=2, name="!", extra=1)))
    assert len(str(caught.value).splitlines()) == 4


def test_a_recipe_that_does_not_exist_is_told_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml does not exist.*balanced, card, fp16"):
        load_recipe(tmp_path / "absent.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


def test_bytes_that_are_no_text_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(path)


def test_a_component_that_a_recipe_does_not_mention_is_named(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, data()))
    assert recipe.for_component(Component.DIT).precision == "int8"
    with pytest.raises(RecipeError, match="'mine' says nothing about component 'decoder'"):
        recipe.for_component(Component.DECODER)


SCHEME = WeightScheme(
    bits=4,
    block_size=64,
    layers=(
        LayerRule(match=r"\.attn\.", bits=8),
        LayerRule(match=r"layers\.0\.", bits=None),
        LayerRule(match="to_out$", bits=6, block_size=32),
    ),
)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("layers.3.ff.up", (4, 64)),
        ("layers.3.attn.to_q", (8, None)),
        ("layers.0.attn.to_q", (None, None)),
        ("layers.0.attn.to_out", (6, 32)),
        ("layers.3.to_out.bias", (4, 64)),
    ],
)
def test_the_last_rule_that_matches_a_layer_decides(layer: str, expected: tuple[int | None, int | None]) -> None:
    assert SCHEME.for_layer(layer) == expected


def test_a_recipe_cannot_be_changed_after_it_was_read() -> None:
    recipe = load_recipe(CONFIGS / "int8.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


def test_plain_data_of_a_component_is_the_same_after_a_round_trip() -> None:
    part = ComponentRecipe(weights=SCHEME, floats="fp16", floor_db=12)
    assert ComponentRecipe.model_validate(part.model_dump(mode="json")) == part


scalars = st.none() | st.booleans() | st.integers(-3, 130) | st.floats(allow_nan=True) | st.text(max_size=8)
keys = st.sampled_from(
    [*(c.value for c in Component), "schema", "name", "description", "components", "weights", "bits", "symmetric",
     "block_size", "rounding", "scales", "layers", "match", "floats", "embedding", "floor_db"]
) | st.text(max_size=4)  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=anything | anything.map(lambda inner: data(components=inner)) | anything.map(lambda i: dit(weights=i)))
def test_whatever_a_file_holds_it_is_a_recipe_or_a_recipe_error(tmp_path: Path, content: Any) -> None:
    path = write(tmp_path, yaml.safe_dump(content))
    try:
        recipe = load_recipe(path)
    except RecipeError:
        return
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60))
def test_whatever_bytes_a_file_holds_it_is_a_recipe_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(path)


schemes = st.builds(
    WeightScheme,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    block_size=st.none() | st.integers(1, 16).map(lambda n: 16 * n),
    rounding=st.sampled_from(["converter", "least_squares", "error_compensated"]),
    scales=st.sampled_from(["fp32", "fp16"]),
    layers=st.lists(
        st.builds(LayerRule, match=st.sampled_from(["a", r"\.b$", "^c"]), bits=st.none() | st.integers(2, 8)),
        max_size=3,
    ).map(tuple),
)
parts = st.builds(
    ComponentRecipe,
    weights=st.none() | schemes,
    floats=st.sampled_from(["fp32", "fp16"]),
    floor_db=st.floats(0.1, 150),
)


def compensating_stacks_alone(components: dict[Component, ComponentRecipe]) -> dict[Component, ComponentRecipe]:
    return {name: part for name, part in components.items() if SPECS[name].stack or not part.compensates}


@pytest.mark.parametrize("component", ["number_conditioner", "decoder", "encoder"])
def test_only_components_with_a_stack_of_blocks_are_compensated(tmp_path: Path, component: str) -> None:
    part = {"weights": {"bits": 8, "rounding": "error_compensated"}, "floor_db": 1}
    with pytest.raises(RecipeError, match=rf"{component}\.weights\.rounding: .* use least_squares"):
        load_recipe(write(tmp_path, yaml.safe_dump(data(components={component: part}))))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(components=st.dictionaries(st.sampled_from(list(Component)), parts).map(compensating_stacks_alone))
def test_every_valid_recipe_survives_being_written_and_read(
    tmp_path: Path, components: dict[Component, ComponentRecipe]
) -> None:
    recipe = Recipe(schema_version=1, name="any", description="…", components=components)
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
