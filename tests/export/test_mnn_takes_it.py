"""MNN's converter takes the exported graphs as they are: it has crashed on graphs that nobody tidied up."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sa3_convert.components import Component
from sa3_convert.mnn.converter import mnn_from_onnx
from sa3_convert.mnn.session import MnnSession
from sa3_convert.recipe import ComponentRecipe
from tests.export.conftest import Exported, realistic_feeds, signal_to_noise_db

LEAST_DB = 100.0
"""Two float32 runtimes that sum in another order; measured 113 dB (text encoder, its softcapped logits) to 131 dB."""


@pytest.mark.parametrize("family", ["small", "medium"])
@pytest.mark.parametrize("component", list(Component))
def test_mnn_converts_the_export_and_computes_the_same(
    family: str, component: Component, exported: Callable[[str, Component], Exported], tmp_path: Path
) -> None:
    model = exported(family, component)
    target = tmp_path / f"{component.value}.mnn"
    mnn_from_onnx(model.path, target, ComponentRecipe(floor_db=LEAST_DB))
    session = MnnSession(target, inputs=None, outputs=None, threads=1)
    for latents in (2, 6, 40) if model.contract.is_dynamic else (0,):
        feeds = realistic_feeds(model.contract, latents)
        result = session.run(feeds)[model.contract.outputs[0].name]
        assert signal_to_noise_db(model.by_onnx(feeds), result) >= LEAST_DB
