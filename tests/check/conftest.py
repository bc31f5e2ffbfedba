"""A real bundle of two small components, converted once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component
from sa3_convert.convert.conversion import convert
from sa3_convert.convert.plan import ConvertRequest
from sa3_convert.recipe import Recipe
from tests.conftest import GOLDEN

COMPONENTS = (Component.NUMBER_CONDITIONER, Component.DIT)


def make_recipe(floor_db: float = 30.0) -> Recipe:
    part = {"weights": {"bits": 8}, "floor_db": floor_db}
    return Recipe.model_validate(
        {"schema": 1, "name": "int8", "description": "", "components": dict.fromkeys(COMPONENTS, part)}
    )


@pytest.fixture(scope="session")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    request = ConvertRequest(
        checkpoint=Checkpoint.open(GOLDEN / "small" / "checkpoint"),
        recipe=make_recipe(),
        out=folder / "int8",
        cache=folder / "cache",
        components=COMPONENTS,
        with_reference=True,
        threads=2,
    )
    convert(request, lambda event: None)
    return folder / "int8"


@pytest.fixture
def copy_of(two_models: Path, tmp_path: Path) -> Callable[[], Path]:
    """Return a function that makes a fresh copy of the bundle's folder."""
    count = iter(range(10_000))

    def copy() -> Path:
        return Path(shutil.copytree(two_models, tmp_path / f"copy{next(count)}"))

    return copy


@pytest.fixture
def bundle(copy_of: Callable[[], Path]) -> Bundle:
    return Bundle.open(copy_of())
