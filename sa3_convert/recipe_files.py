"""Recipes as files: the user's and the project's own, and what one that extends another comes to."""

import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from sa3_convert.errors import RecipeError
from sa3_convert.plain_yaml import parse_yaml
from sa3_convert.untrusted import read_text

_CONFIGS: Final = "configs"
_EXTENDS: Final = "extends"
_LARGEST: Final = 64 << 10
"""Bytes of a file; a rule for each layer of the largest component takes a quarter of them."""
_LONGEST_CHAIN: Final = 8


def recipe_file(given: Path, beside: Path = Path()) -> Path:
    """Return the file that is meant: itself, or the project's own of that name wherever the command is run.

    `int8`, `int8.yaml` and `configs/int8.yaml` are the same recipe where no file of that name is in the way.

    Args:
        given: a path or a name.
        beside: the folder that a relative path counts from.

    Raises:
        RecipeError: neither is there.

    """
    path = beside / given
    if os.path.isfile(path):  # noqa: PTH113 -- Path.is_file raises for a name that is too long
        return path
    own = own_recipes()
    name = given.name.removesuffix(".yaml")
    if given.parent in (Path(), Path(_CONFIGS)) and name in own:
        return own[name]
    if os.path.lexists(path):
        return path
    raise _absent(path)


def own_recipes() -> dict[str, Path]:
    """Return the recipes that come with the project, by name: of the checkout, or as they were installed."""
    checkout = Path(__file__).parents[1] / _CONFIGS
    files = list(checkout.glob("*.yaml")) if checkout.is_dir() else _installed()
    return {file.stem: file for file in sorted(files)}


def read_recipe(path: Path, *, resolved: bool = False) -> Any:
    """Return what stands in a recipe, put over what stands in the one that it extends.

    A mapping is put over a mapping key by key; anything else, lists too, replaces what was there. Name and description
    are a recipe's own.

    Args:
        path: the file.
        resolved: whether it may not extend another, as one in a bundle, which is written with all that it says.

    Raises:
        RecipeError: a file is missing, cannot be read, or extends itself by way of others.

    """
    if not resolved:
        return _over_its_base(path, ())
    data = _parsed(path)
    if isinstance(data, dict) and _EXTENDS in data:
        raise RecipeError(f"Recipe {path} extends another. A bundle's stands for itself; convert again.")
    return data


def _over_its_base(path: Path, above: tuple[str, ...]) -> Any:
    data = _parsed(path)
    if not isinstance(data, dict) or _EXTENDS not in data:
        return data
    base = data.pop(_EXTENDS)
    if not isinstance(base, str) or not base:
        raise RecipeError(f"Recipe {path} is not valid:\n  {_EXTENDS}: is to be the name or path of another recipe")
    chain = (*above, os.path.realpath(path))
    if len(chain) > _LONGEST_CHAIN:
        raise RecipeError(f"Recipe {path} is the {len(chain)}th that extends another; at most {_LONGEST_CHAIN} may.")
    try:
        file = recipe_file(Path(base), path.parent)
    except RecipeError as error:
        raise RecipeError(f"Recipe {path} extends one that is not there. {error}") from None
    if os.path.realpath(file) in chain:
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
        return parse_yaml(read_text(path, _LARGEST))
    except FileNotFoundError:
        raise _absent(path) from None
    except OSError as error:
        raise RecipeError(f"Recipe {path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
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
