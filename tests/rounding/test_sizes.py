"""Sizes that are counted before a conversion are those of the file that comes out."""

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from sa3_convert.convert.plan import estimate_model_bytes
from sa3_convert.lab.planner.sensitivity import stored_bytes
from sa3_convert.mnn.converter import mnn_from_onnx
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.recipe import ComponentRecipe, LayerRule, ScaleType, WeightScheme
from sa3_convert.rounding.grid import Grid
from tests.mnn.converted import gaussian, save_graph

INPUTS, OUTPUTS = 512, 1024


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("linear") / "linear.onnx"
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return save_graph(path, [node], {"x": (TensorProto.FLOAT, [1, INPUTS])}, ["y"], {"w": gaussian(INPUTS, OUTPUTS)})


@pytest.mark.parametrize("scales", ["fp32", "fp16"])
@pytest.mark.parametrize(("bits", "symmetric", "block"), [(8, False, None), (8, False, 16), (4, True, 32)])
def test_a_weight_takes_the_bytes_that_were_counted(
    linear: Path, tmp_path: Path, bits: int, symmetric: bool, block: int | None, scales: ScaleType
) -> None:
    scheme = WeightScheme(bits=bits, symmetric=symmetric, block_size=block, scales=scales)
    recipe = ComponentRecipe(floor_db=1, weights=scheme)
    mnn_from_onnx(linear, tmp_path / "linear.mnn", recipe)
    ((_, weight),) = read_storage(tmp_path / "linear.mnn").weighted()
    counted = stored_bytes((OUTPUTS, INPUTS), Grid(bits, symmetric, block, half_scales=scales == "fp16"))
    assert 0 <= weight.payload.bytes + weight.scale_bytes - counted < 300  # a codebook's header and list of values
    assert estimate_model_bytes({"w": (OUTPUTS, INPUTS)}, recipe) == counted


def test_a_rule_for_a_layer_counts_for_its_parameter() -> None:
    rule = LayerRule(match="down_proj$", bits=4)
    recipe = ComponentRecipe(floor_db=1, weights=WeightScheme(bits=8, layers=(rule,)))
    shapes = {"mlp.down_proj.weight": (64, 128), "mlp.up_proj.weight": (128, 64)}
    assert estimate_model_bytes(shapes, recipe) == 64 * 128 // 2 + 64 * 8 + 128 * 64 + 128 * 8
