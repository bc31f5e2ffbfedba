"""Which MNN a component is made for: what was asked, or the oldest that reads it at no cost."""

import pytest

from sa3_convert.errors import UsageError
from sa3_convert.mnn.compatibility import MnnVersion, is_older, target_for
from sa3_convert.recipe import ComponentRecipe, WeightScheme

FLOAT = ComponentRecipe(floor_db=1)
INT8 = ComponentRecipe(floor_db=1, weights=WeightScheme(bits=8))
HALF_SCALES = ComponentRecipe(floor_db=1, weights=WeightScheme(bits=8, scales="fp16"))


@pytest.mark.parametrize(
    ("recipe", "asked", "target"),
    [
        (FLOAT, None, "3.1"),
        (INT8, None, "3.1"),
        (HALF_SCALES, None, "3.6"),
        (INT8, "3.0", "3.0"),
        (INT8, "3.6", "3.6"),
        (HALF_SCALES, "3.6", "3.6"),
    ],
)
def test_the_target(recipe: ComponentRecipe, asked: MnnVersion | None, target: MnnVersion) -> None:
    assert target_for(recipe, asked) == target


@pytest.mark.parametrize("asked", ["3.0", "3.1", "3.5"])
def test_scales_that_the_target_cannot_read_are_refused(asked: MnnVersion) -> None:
    with pytest.raises(UsageError, match=r"scales: fp32 .* --target-mnn 3\.6"):
        target_for(HALF_SCALES, asked)


def test_the_order_of_versions() -> None:
    assert is_older("3.0", "3.1")
    assert is_older("3.5", "3.6")
    assert not is_older("3.6", "3.6")
    assert not is_older("3.5", "3.1")
