"""The default recipe: an INT8 embedding and INT8 linears with FP16 scales survive the converter's second pass."""

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.components import Component
from sa3_convert.mnn.audit import audit
from sa3_convert.mnn.storage import read_storage
from sa3_convert.recipe import load_recipe
from tests.bundles import CONFIGS


def test_its_text_encoder_holds_integers_and_halves_only(toy_int8: Bundle) -> None:
    storage = read_storage(toy_int8.file(Component.TEXT_ENCODER))
    summary = audit(storage, load_recipe(CONFIGS / "int8.yaml").for_component(Component.TEXT_ENCODER))
    assert summary.quantised == summary.layers > 0
    assert [table.type for table in summary.tables] == ["int8"]
    assert {weight.scale_type for _, weight in storage.weighted()} == {"fp16"}
