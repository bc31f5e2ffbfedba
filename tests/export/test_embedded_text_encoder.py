"""The text encoder that takes rows of its table computes what the contract's does, without an integer."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import sa3_convert.cli.app as cli
from sa3_convert.check.inputs import sample_inputs
from sa3_convert.check.metrics import compare
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component
from sa3_convert.export.component import export_component, export_embedded_text_encoder
from sa3_convert.ort import OrtSession
from sa3_convert.passes.hazards import find_hazards
from sa3_convert.passes.pipeline import load_onnx


@pytest.fixture(scope="module")
def embedded(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedded") / "text_encoder.onnx"
    export_embedded_text_encoder(Checkpoint.open(toy), path)
    return path


def test_it_computes_what_the_contract_one_does(embedded: Path, toy: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(toy)
    export_component(checkpoint, Component.TEXT_ENCODER, tmp_path / "text_encoder.onnx")
    table = checkpoint.state(Component.TEXT_ENCODER)["embed_tokens.weight"].float().numpy()
    for seed in range(3):
        feeds = sample_inputs(Component.TEXT_ENCODER, checkpoint.layout, seed=seed, latents=1).feeds
        (expected,) = OrtSession(tmp_path / "text_encoder.onnx").run(feeds).values()
        bias = np.where(feeds["attention_mask"] == 1, 0, -1e4).astype(np.float32)
        (found,) = (
            OrtSession(embedded).run({"inputs_embeds": table[feeds["input_ids"]], "attention_bias": bias}).values()
        )
        assert compare(expected, found).signal_to_noise_db > 120


def test_it_holds_neither_the_table_nor_integer_data(embedded: Path) -> None:
    model = onnx.load(embedded, load_external_data=False)
    assert "embed_tokens.weight" not in {tensor.name for tensor in model.graph.initializer}
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Gather", "Cast"})
    assert {hazard.severity for hazard in find_hazards(load_onnx(embedded))} <= {"info"}


def test_the_command_exports_it(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--component", "text_encoder", "--inputs-embeds", "--out", str(tmp_path / "te.onnx")]
    assert cli.run(["export", str(toy), *arguments]) == 0
    assert OrtSession(tmp_path / "te.onnx").inputs == ("inputs_embeds", "attention_bias")
    assert (
        cli.run(["export", str(toy), "--component", "dit", "--inputs-embeds", "--out", str(tmp_path / "d.onnx")]) == 2
    )
    assert "text_encoder" in capsys.readouterr().err
