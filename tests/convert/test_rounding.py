"""Error-compensated rounding in a whole conversion: a stage of its own, kept until checkpoint or recipe change."""

from pathlib import Path

from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component
from sa3_convert.convert.conversion import StageEvent, convert
from sa3_convert.convert.plan import ConvertRequest, plan
from sa3_convert.recipe import ComponentRecipe, Recipe, Rounding, WeightScheme

TEXT_ENCODER = Component.TEXT_ENCODER


def request(checkpoint: Path, cache: Path, out: Path, *, bits: int = 8, rounding: Rounding) -> ConvertRequest:
    scheme = WeightScheme(bits=bits, block_size=16, rounding=rounding)
    recipe = Recipe(
        schema_version=1,
        name=f"int{bits}-{rounding.replace('_', '-')}",
        description="One component.",
        components={TEXT_ENCODER: ComponentRecipe(weights=scheme, floor_db=10)},
    )
    opened = Checkpoint.open(checkpoint)
    return ConvertRequest(opened, recipe, out, cache, components=(TEXT_ENCODER,), threads=1)


def made_anew(asked: ConvertRequest) -> list[str]:
    events: list[StageEvent] = []
    convert(asked, events.append)
    return [event.stage for event in events if event.state == "done"]


def test_weights_are_rounded_ahead_once_and_only_for_recipes_that_ask_for_it(toy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    plain = request(toy, cache, tmp_path / "plain", rounding="least_squares")
    assert made_anew(plain) == ["export", "mnn", "verify"]

    compensated = request(toy, cache, tmp_path / "int8", rounding="error_compensated")
    assert [step.todo for step in plan(compensated).steps] == [("round", "mnn", "verify")]
    assert made_anew(compensated) == ["round", "mnn", "verify"]
    assert [step.todo for step in plan(compensated).steps] == [()]
    assert made_anew(compensated) == []

    fewer_bits = request(toy, cache, tmp_path / "int6", bits=6, rounding="error_compensated")
    assert made_anew(fewer_bits) == ["round", "mnn", "verify"]


def test_planned_weights_that_were_damaged_are_made_again(toy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert "round" in made_anew(request(toy, cache, tmp_path / "first", rounding="error_compensated"))
    (planned,) = cache.glob("round/*/weights.safetensors")
    planned.write_bytes(b"damaged")
    again = request(toy, cache, tmp_path / "second", bits=6, rounding="error_compensated")
    assert made_anew(again) == ["round", "mnn", "verify"]
