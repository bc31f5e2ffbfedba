"""The default recipe: an INT8 embedding and INT8 linears with FP16 scales survive the converter's second pass."""

from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component
from sa3_convert.mnn.file.audit import audit
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.recipe import load_recipe
from tests.bundles import CONFIGS


def test_its_text_encoder_holds_integers_and_halves_only(toy_int8: Bundle) -> None:
    storage = read_storage(toy_int8.file(Component.TEXT_ENCODER))
    summary = audit(storage, load_recipe(CONFIGS / "int8.yaml").for_component(Component.TEXT_ENCODER))
    kept = [f"layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "vo"]
    assert sorted(summary.kept_float) == sorted(kept)
    assert summary.quantised == summary.layers - len(kept) > 0
    assert [table.type for table in summary.tables] == ["int8"]
    scaled = [weight for _, weight in storage.weighted() if weight.scale_type is not None]
    assert len(scaled) == summary.quantised
    assert {weight.scale_type for weight in scaled} == {"fp16"}


def test_half_arithmetic_spares_all_but_what_takes_seconds_or_a_time(toy_int8: Bundle) -> None:
    found = {component: toy_int8.artifact(component).half_db for component in toy_int8.components}
    known = {component: ratio for component, ratio in found.items() if ratio is not None}
    assert known.keys() == set(Component)
    # One rounding to half leaves 66 dB, some ten in turn 55 to 65. MNN on ARM was measured with 0.5 and 8.7 dB where
    # the phases of Fourier features are lost; anything of that kind is below 20.
    lost = {Component.NUMBER_CONDITIONER, Component.DIT}
    assert all(known[component] < 20 for component in lost)
    assert all(known[component] > 50 for component in known.keys() - lost)
    lowest = {component: toy_int8.artifact(component).lowest_precision for component in known}
    assert lowest == {component: "normal" if component in lost else "low" for component in known}
