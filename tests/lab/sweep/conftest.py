"""What a toy is tried by."""

from pathlib import Path

import pytest

from sa3_convert.components import Component
from sa3_convert.lab.sweep.points import Point, of_recipes
from sa3_convert.recipe import load_recipe, recipe_file


@pytest.fixture(scope="module")
def points() -> list[Point]:
    return of_recipes(
        [load_recipe(recipe_file(Path(name))) for name in ("int8", "fp16")], [Component.NUMBER_CONDITIONER]
    )
