"""Error-compensated rounding in a whole conversion: a stage of its own, kept until checkpoint or recipe change."""

from dataclasses import replace
from pathlib import Path

import pytest

from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component
from sa3_convert.convert.conversion import StageEvent, convert
from sa3_convert.convert.plan import ConvertRequest, plan
from sa3_convert.recipe import ComponentRecipe, Recipe, Rounding, WeightScheme
from sa3_convert.rounding import compensated

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


class InterruptedHereError(Exception):
    """What ends a conversion in its middle."""


def interrupted(asked: ConvertRequest, done: int) -> None:
    """Convert, and stop when so many layers are rounded."""

    def report(event: StageEvent) -> None:
        if event.state == "working" and event.detail.startswith(f"{done} of "):
            raise InterruptedHereError

    with pytest.raises(InterruptedHereError):
        convert(asked, report)


def rounded_now(asked: ConvertRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Convert; return how many layers were rounded for it, and what was told meanwhile."""
    made, told = [], []
    original = compensated._BlockRounding.make

    def counted(self: compensated._BlockRounding, grid_of: compensated.GridOf) -> list[compensated.RoundedLinear]:
        made.append(1)
        return original(self, grid_of)

    monkeypatch.setattr(compensated._BlockRounding, "make", counted)
    convert(asked, lambda event: told.append(event.detail) if event.state == "working" else None)
    return len(made), told


def weights(cache: Path) -> bytes:
    (planned,) = cache.glob("round/*/weights.safetensors")
    return planned.read_bytes()


def test_an_interrupted_rounding_goes_on_behind_the_last_layer_that_was_done(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    layers, told = rounded_now(request(toy, whole, tmp_path / "a", rounding="error_compensated"), monkeypatch)
    assert layers > 1
    assert told == [f"{done} of {layers}" for done in range(layers)]
    assert not list(whole.glob("unfinished/*"))

    interrupted(request(toy, cache, tmp_path / "b", rounding="error_compensated"), 1)
    assert len(list(cache.glob("unfinished/*/*/weights.safetensors"))) == 1
    assert not list(cache.glob("round/*/weights.safetensors"))
    made, told = rounded_now(request(toy, cache, tmp_path / "b", rounding="error_compensated"), monkeypatch)
    assert (made, told[0]) == (layers - 1, f"0 of {layers}")
    assert weights(cache) == weights(whole)
    assert not list(cache.glob("unfinished/*"))


@pytest.mark.parametrize("what", ["recipe", "damage", "force"])
def test_layers_of_something_else_damaged_ones_and_unwanted_ones_are_not_taken(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    asked = request(toy, tmp_path / "cache", tmp_path / "out", rounding="error_compensated")
    interrupted(asked, 1)
    (kept,) = (tmp_path / "cache").glob("unfinished/*/*/weights.safetensors")
    if what == "recipe":
        asked = request(toy, tmp_path / "cache", tmp_path / "out", bits=6, rounding="error_compensated")
    elif what == "damage":
        kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    else:
        asked = replace(asked, force=True)
    made, told = rounded_now(asked, monkeypatch)
    assert made == len(told)
