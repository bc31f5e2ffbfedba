"""The project's own recipes are found by name from any folder; the user's files come first."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert import recipe as recipe_files
from sa3_convert.components import Component
from sa3_convert.errors import RecipeError
from sa3_convert.recipe import ComponentRecipe, LayerRule, WeightScheme, load_recipe, own_recipes, recipe_file

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", ["int8", "int8.yaml", "configs/int8.yaml", "configs/int8"])
def test_a_name_is_enough(given: str) -> None:
    assert recipe_file(Path(given)) == CONFIGS / "int8.yaml"


def test_own_recipes_are_all_of_them_and_say_their_names() -> None:
    assert sorted(own_recipes()) == sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    assert {load_recipe(file).name for file in own_recipes().values()} == set(own_recipes())


@pytest.mark.parametrize("given", ["int8", "int8.yaml", "configs/int8.yaml"])
def test_a_file_of_the_users_comes_first(elsewhere: Path, given: str) -> None:
    (elsewhere / given).parent.mkdir(exist_ok=True)
    (elsewhere / given).write_text("mine")
    assert recipe_file(Path(given)) == Path(given)


@pytest.mark.parametrize("given", ["int9", "int9.yaml", "elsewhere/int8.yaml", "/int8.yaml"])
def test_what_is_nowhere_is_refused_with_what_there_is(given: str) -> None:
    with pytest.raises(RecipeError, match=r"does not exist\. .*balanced, card, fp16, fp32, int4, int8"):
        recipe_file(Path(given))


def test_installed_recipes_lie_in_the_package(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = elsewhere / "lib" / "site-packages" / "sa3_convert"
    others = package.parent / "configs"
    for folder in (package / "configs", others):
        folder.mkdir(parents=True)
    (package / "configs" / "int8.yaml").write_text("installed")
    (others / "other.yaml").write_text("of another package")
    monkeypatch.setattr(recipe_files, "__file__", str(package / "recipe.py"))
    assert own_recipes() == {"int8": (package / "configs" / "int8.yaml").resolve()}


def test_the_default_works_in_any_folder(toy: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert", str(toy), "--out", str(elsewhere / "out"), "--dry-run"]) == 0
    assert cli.run(["convert", str(toy), "--recipe", "fp16", "--out", str(elsewhere / "out"), "--dry-run"]) == 0
    assert "recipe fp16" in capsys.readouterr().err


BASE = """schema: 1
name: base
description: what others build on
components:
  dit:
    weights: {bits: 8, scales: fp16, layers: [{match: a$, bits: 4}, {match: b$, bits: null}]}
    floor_db: 20
  decoder: {floats: fp16, floor_db: 30}
"""
HEAD = "schema: 1\nname: mine\ndescription: of my own\n"


def extending(folder: Path, text: str, base: str = "base.yaml") -> Path:
    (folder / "base.yaml").write_text(BASE)
    path = folder / "mine.yaml"
    path.write_text(f"{HEAD}extends: {base}\n{text}")
    return path


def test_a_recipe_that_adds_nothing_is_its_base_by_another_name(elsewhere: Path) -> None:
    mine = load_recipe(extending(elsewhere, ""))
    assert (mine.name, mine.description) == ("mine", "of my own")
    assert mine.components == load_recipe(elsewhere / "base.yaml").components


def test_mappings_are_merged_and_all_else_replaced(elsewhere: Path) -> None:
    text = """components:
  dit:
    weights: {bits: 6, layers: [{match: c$, bits: 5}]}
  decoder: {weights: {bits: 8}, floor_db: 25}
  encoder: {floor_db: 40}
"""
    mine = load_recipe(extending(elsewhere, text))
    dit = mine.for_component(Component.DIT)
    assert dit.weights == WeightScheme(bits=6, scales="fp16", layers=(LayerRule(match="c$", bits=5),))
    assert dit.floor_db == 20
    assert mine.for_component(Component.DECODER) == ComponentRecipe(
        weights=WeightScheme(bits=8), floats="fp16", floor_db=25
    )
    assert mine.for_component(Component.ENCODER) == ComponentRecipe(floor_db=40)


def test_null_takes_out_what_was_there(elsewhere: Path) -> None:
    mine = load_recipe(extending(elsewhere, "components: {dit: {weights: null}}"))
    assert mine.for_component(Component.DIT).weights is None


def test_name_and_description_are_not_inherited(elsewhere: Path) -> None:
    path = extending(elsewhere, "")
    path.write_text(path.read_text().replace("name: mine\n", ""))
    with pytest.raises(RecipeError, match="name: Field required"):
        load_recipe(path)


def test_a_base_is_looked_for_beside_the_file_and_then_among_the_projects_own(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = elsewhere / "recipes"
    folder.mkdir()
    path = extending(folder, "components: {dit: {floor_db: 19}}")
    monkeypatch.chdir("/")
    assert load_recipe(path).for_component(Component.DECODER).floats == "fp16"
    own = extending(folder, "components: {dit: {floor_db: 19}}", base="int8")
    assert load_recipe(own).for_component(Component.DIT).floor_db == 19
    assert load_recipe(own).for_component(Component.DECODER) == load_recipe(CONFIGS / "int8.yaml").for_component(
        Component.DECODER
    )


def test_bases_have_bases(elsewhere: Path) -> None:
    extending(elsewhere, "components: {dit: {floor_db: 19}}")
    top = elsewhere / "top.yaml"
    top.write_text(HEAD.replace("mine", "top") + "extends: mine.yaml\ncomponents: {decoder: {floor_db: 31}}")
    assert {c.value: part.floor_db for c, part in load_recipe(top).components.items()} == {"dit": 19, "decoder": 31}


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("mine.yaml", "extends this one in turn"),
        ("absent.yaml", r"extends one that is not there\. .*own are balanced"),
        ("[a]", "name or path"),
        ("''", "name or path"),
        ("broken.yaml", "broken.yaml cannot be read"),
        ("list.yaml", "holds no recipe"),
        (".", "cannot be read"),
    ],
)
def test_a_base_that_cannot_be_one_is_refused(elsewhere: Path, base: str, said: str) -> None:
    (elsewhere / "broken.yaml").write_text("a: [")
    (elsewhere / "list.yaml").write_text("[]")
    with pytest.raises(RecipeError, match=f"(?s)mine.yaml.*{said}|{said}"):
        load_recipe(extending(elsewhere, "", base=base))


def test_a_circle_of_two_is_refused(elsewhere: Path) -> None:
    path = extending(elsewhere, "")
    (elsewhere / "base.yaml").write_text(BASE + "extends: mine.yaml\n")
    with pytest.raises(RecipeError, match="in turn"):
        load_recipe(path)


def test_a_misspelled_key_is_recognised(elsewhere: Path) -> None:
    path = extending(elsewhere, "")
    path.write_text(path.read_text().replace("extends:", "extend:"))
    with pytest.raises(RecipeError, match="perhaps you meant 'extends'"):
        load_recipe(path)


@pytest.mark.parametrize("given", ["int8", "int8.yaml", "configs/int8.yaml"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_not_in_the_way_of_a_name_of_ours(
    elsewhere: Path, given: str, make: Callable[[Path], None]
) -> None:
    (elsewhere / given).parent.mkdir(exist_ok=True)
    make(elsewhere / given)
    assert recipe_file(Path(given)) == CONFIGS / "int8.yaml"


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    path.write_text(HEAD + "# " + "x" * 100_000)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.mkdir, "not a regular file"),
        (os.mkfifo, "not a regular file"),
        (_endless, "not a regular file"),
        (_huge, "more than 65536 bytes"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "does not exist"),
    ],
)
@pytest.mark.parametrize("extends", [False, True])
def test_what_is_no_file_of_a_recipes_size_is_refused_at_once(
    elsewhere: Path, make: Callable[[Path], None], said: str, extends: bool
) -> None:
    make(elsewhere / "theirs")
    (elsewhere / "mine").write_text(f"{HEAD}extends: theirs\n")
    began = time.monotonic()
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe_file(Path("mine" if extends else "theirs")))
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\udcff", ""])
def test_a_name_that_no_file_can_have_is_refused(elsewhere: Path, name: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(recipe_file(Path(name)))
    (elsewhere / "mine").write_text(HEAD + "extends: " + json.dumps(name))
    with pytest.raises(RecipeError):
        load_recipe(elsewhere / "mine")


def test_a_long_chain_is_refused(elsewhere: Path) -> None:
    (elsewhere / "0").write_text(BASE)
    for link in range(1, 12):
        (elsewhere / str(link)).write_text(f'{HEAD}extends: "{link - 1}"\n')
    assert load_recipe(elsewhere / "8").name == "mine"
    with pytest.raises(RecipeError, match="9th that extends another"):
        load_recipe(elsewhere / "11")


def test_the_recipe_of_a_bundle_may_name_no_other_file(elsewhere: Path) -> None:
    path = extending(elsewhere, "")
    with pytest.raises(RecipeError, match="stands for itself"):
        load_recipe(path, resolved=True)
    path.write_text(load_recipe(path).to_yaml())
    assert load_recipe(path, resolved=True).name == "mine"


def test_thousands_of_faults_are_told_in_a_few_lines(elsewhere: Path) -> None:
    path = elsewhere / "mine"
    path.write_text("".join(f"k{number}: 1\n" for number in range(4000)))
    began = time.process_time()
    with pytest.raises(RecipeError, match=r"and 39\d\d more") as caught:
        load_recipe(path)
    assert time.process_time() - began < 2
    assert len(str(caught.value).splitlines()) < 30


@pytest.mark.parametrize("match", ["(a+)+$", "(.*)*(.*)*x", "(a|a)*b"])
def test_a_catastrophic_pattern_matches_in_no_time(elsewhere: Path, match: str) -> None:
    path = elsewhere / "mine"
    path.write_text(BASE.replace("a$", json.dumps(match)))
    weights = load_recipe(path).for_component(Component.DIT).weights
    assert weights is not None
    began = time.process_time()
    weights.for_layer("a" * 200 + "!")
    assert time.process_time() - began < 0.5
