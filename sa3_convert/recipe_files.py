"""Recipes as files: the user's and the project's own, and what one that extends another comes to."""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import yaml

from sa3_convert.errors import RecipeError

_CONFIGS: Final = "configs"
_EXTENDS: Final = "extends"


def recipe_file(given: Path, beside: Path = Path()) -> Path:
    """Return the file that is meant: itself, or the project's own of that name wherever the command is run.

    `int8`, `int8.yaml` and `configs/int8.yaml` are the same recipe where no file of that name is in the way.

    Args:
        given: a path or a name.
        beside: the folder that a relative path counts from.

    Raises:
        RecipeError: neither is there.

    """
    if (beside / given).exists():
        return beside / given
    own = own_recipes()
    name = given.name.removesuffix(".yaml")
    if given.parent in (Path(), Path(_CONFIGS)) and name in own:
        return own[name]
    raise _absent(beside / given)


def own_recipes() -> dict[str, Path]:
    """Return the recipes that come with the project, by name: of the checkout, or as they were installed."""
    checkout = Path(__file__).parents[1] / _CONFIGS
    files = list(checkout.glob("*.yaml")) if checkout.is_dir() else _installed()
    return {file.stem: file for file in sorted(files)}


def read_recipe(path: Path) -> Any:
    """Return what stands in a recipe, put over what stands in the one that it extends.

    A mapping is put over a mapping key by key; anything else, lists too, replaces what was there. Name and description
    are a recipe's own.

    Raises:
        RecipeError: a file is missing, cannot be read, or extends itself by way of others.

    """
    return _over_its_base(path, ())


def _over_its_base(path: Path, above: tuple[Path, ...]) -> Any:
    data = _parsed(path)
    if not isinstance(data, dict) or _EXTENDS not in data:
        return data
    base = data.pop(_EXTENDS)
    if not isinstance(base, str) or not base:
        raise RecipeError(f"Recipe {path} is not valid:\n  {_EXTENDS}: is to be the name or path of another recipe")
    chain = (*above, path.resolve())
    try:
        file = recipe_file(Path(base), path.parent)
    except RecipeError as error:
        raise RecipeError(f"Recipe {path} extends one that is not there. {error}") from None
    if file.resolve() in chain:
        raise RecipeError(f"Recipe {path} is not valid:\n  {_EXTENDS}: {base} extends this one in turn")
    below = _over_its_base(file, chain)
    if not isinstance(below, dict):
        raise RecipeError(f"Recipe {path} extends {file}, which holds no recipe.")
    inherited = {key: value for key, value in below.items() if key not in ("name", "description")}
    return _merged(inherited, data)


def _merged(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            value = _merged(under, value)
        merged[key] = value
    return merged


def _parsed(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _absent(path) from None
    # yaml lets a ValueError pass for a date or a number that cannot be, and ends deep nesting with a RecursionError.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"Recipe {path} cannot be read: {error}") from None


def _absent(path: Path) -> RecipeError:
    return RecipeError(f"Recipe {path} does not exist. The project's own are {', '.join(own_recipes())}.")


def _installed() -> list[Path]:
    try:
        recorded = metadata.files("sa3-convert") or []
    except metadata.PackageNotFoundError:
        return []
    found = [file for file in recorded if file.suffix == ".yaml" and file.parent.name == _CONFIGS]
    return [Path(str(file.locate())).resolve() for file in found]
