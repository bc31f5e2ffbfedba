"""The project's own recipes are found by name from any folder; the user's files come first."""

from importlib import metadata
from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert import recipe_files
from sa3_convert.components import Component
from sa3_convert.errors import RecipeError
from sa3_convert.recipe import ComponentRecipe, LayerRule, WeightScheme, load_recipe
from sa3_convert.recipe_files import own_recipes, recipe_file

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
    with pytest.raises(RecipeError, match=r"does not exist\. .*balanced, card, fp16, fp32, int8"):
        recipe_file(Path(given))


def test_installed_recipes_are_found_where_pip_recorded_them(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = elsewhere / "lib" / "site-packages" / "sa3_convert"
    shared = elsewhere / "share" / "sa3-convert" / "configs"
    for folder in (package, shared):
        folder.mkdir(parents=True)
    (shared / "int8.yaml").write_text("installed")
    monkeypatch.setattr(recipe_files, "__file__", str(package / "recipe_files.py"))

    def files(_: str) -> list[metadata.PackagePath]:
        recorded = [metadata.PackagePath(f"../../share/sa3-convert/configs/{name}") for name in ("int8.yaml", "x.txt")]
        for file in recorded:
            file.dist = metadata.PathDistribution(package.parent / "sa3_convert.dist-info")
        return recorded

    monkeypatch.setattr(recipe_files.metadata, "files", files)
    assert own_recipes() == {"int8": (shared / "int8.yaml").resolve()}


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
