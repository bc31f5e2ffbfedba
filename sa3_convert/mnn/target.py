"""The versions of MNN that a conversion can be for: the oldest one on which the result has to be right."""

import re
from typing import TYPE_CHECKING, Final, Literal

from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    # The command line is built from this module, and a recipe's data classes take longer to import than all of it.
    from sa3_convert.recipe import ComponentRecipe

MnnVersion = Literal["3.0", "3.1", "3.5", "3.6"]

DEFAULT_TARGET: Final[MnnVersion] = "3.1"
"""What costs nothing: 3.0 does not know SiLU as one operator."""
_HALF_SCALES: Final[MnnVersion] = "3.6"
"""Measured: MNN 3.5.0 and before look for float32 scales, find none, and divide by their number (SIGFPE)."""


def version_numbers(version: str) -> tuple[int, ...]:
    """Return up to three numbers in front, which order versions: a build of one's own may have more behind them."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def is_older(version: str, than: str) -> bool:
    """Whether a version came before another."""
    return version_numbers(version) < version_numbers(than)


def target_for(recipe: "ComponentRecipe", asked: MnnVersion | None) -> MnnVersion:
    """Return the oldest MNN that a component, stored as its recipe says, is made to be right on.

    Args:
        recipe: how it is stored.
        asked: what the user wants; None is the oldest that costs nothing and reads what is stored.

    Raises:
        UsageError: what is asked for cannot read it.

    """
    has_half_scales = recipe.weights is not None and recipe.weights.scales == "fp16"
    oldest = _HALF_SCALES if has_half_scales else DEFAULT_TARGET
    if asked is None:
        return oldest
    if has_half_scales and is_older(asked, oldest):
        raise UsageError(
            f"MNN {asked} cannot read scales: fp16, which the recipe asks for: it crashes. "
            f"Use scales: fp32 in the recipe, or --target-mnn {oldest}."
        )
    return asked
