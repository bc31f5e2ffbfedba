"""The audit lets through what the recipe asked for and refuses everything else by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from sa3_convert.errors import ConversionError
from sa3_convert.mnn.converter import mnn_from_onnx
from sa3_convert.mnn.file.audit import audit
from sa3_convert.mnn.file.contents import ModelStorage
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.passes.quantise_embedding import quantise_embedding
from sa3_convert.recipe import ComponentRecipe, WeightScheme
from tests.mnn.converted import Converter, gaussian, save_graph

FLOAT32 = ComponentRecipe(floor_db=1)
FLOAT16 = ComponentRecipe(floor_db=1, floats="fp16")

INT4 = ("--weightQuantBits", "4")
SYMMETRIC = "--weightQuantAsymmetric=0"


def integers(bits: int = 4, *, embedding: str = "float", floats: str = "fp32", **scheme: object) -> ComponentRecipe:
    weights = WeightScheme.model_validate({"bits": bits, **scheme})
    return ComponentRecipe(floor_db=1, weights=weights, floats=floats, embedding=embedding)


def network(path: Path, *, table: str = "table") -> Path:
    """Write token lookup → two linears → convolution."""
    nodes = [
        helper.make_node("Gather", [table, "ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "w1"], ["up"]),
        helper.make_node("MatMul", ["up", "w2"], ["down"]),
        helper.make_node("Transpose", ["down"], ["channels_first"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["channels_first", "kernel"], ["out"], pads=[1, 1]),
    ]
    constants = {
        table: gaussian(50, 64),
        "w1": gaussian(64, 128, seed=1),
        "w2": gaussian(128, 64, seed=2),
        "kernel": gaussian(32, 64, 3, seed=3),
    }
    return save_graph(path, nodes, {"ids": (TensorProto.INT32, [1, 8])}, ["out"], constants)


def with_product(path: Path) -> Path:
    """Write a linear and a product with a 3-D constant, which the converter leaves alone."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["y", "stack"], ["out"])]
    constants = {"w": gaussian(64, 64), "stack": gaussian(1, 64, 32)}
    return save_graph(path, nodes, {"x": (TensorProto.FLOAT, [1, 8, 64])}, ["out"], constants)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return network(tmp_path_factory.mktemp("graph") / "network.onnx")


def stored(converter: Converter, graph: Path, *flags: str, then: tuple[str, ...] = ()) -> ModelStorage:
    made = converter(graph, *flags)
    return read_storage(converter(made, *then) if then else made)


@pytest.mark.parametrize(
    "recipe",
    [
        FLOAT32,
        FLOAT16,
        integers(8),
        integers(4, symmetric=True),
        integers(4, floats="fp16"),
        integers(2, symmetric=True, floats="fp16"),
        integers(4, block_size=16),
        integers(5, block_size=32, symmetric=True),
        integers(4, layers=[{"match": "^up$", "bits": None}, {"match": "out", "bits": 8, "block_size": 16}]),
        integers(4, floats="fp16", layers=[{"match": "down", "bits": None}]),
        integers(8, block_size=16, scales="fp16"),
        integers(4, symmetric=True, scales="fp16", floats="fp16"),
        integers(4, scales="fp16", layers=[{"match": "out", "bits": 8, "block_size": 16}]),
    ],
    ids=lambda recipe: recipe.model_dump_json(exclude={"floor_db"}, exclude_defaults=True),
)
def test_what_the_conversion_makes_of_a_recipe_passes(graph: Path, tmp_path: Path, recipe: ComponentRecipe) -> None:
    model = tmp_path / "network.mnn"
    mnn_from_onnx(graph, model, recipe)
    assert audit(read_storage(model), recipe).layers == 3


def test_the_summary_names_what_was_kept_float(graph: Path, tmp_path: Path) -> None:
    recipe = integers(4, layers=[{"match": "^up$", "bits": None}])
    mnn_from_onnx(graph, tmp_path / "network.mnn", recipe)
    summary = audit(read_storage(tmp_path / "network.mnn"), recipe)
    assert (summary.layers, summary.quantised, summary.kept_float) == (3, 2, ("up",))
    assert [(table.name, table.type, table.shape) for table in summary.tables] == [("table", "fp32", (50, 64))]


@pytest.mark.parametrize(
    ("flags", "recipe", "fault"),
    [
        ((), integers(4), r"layer up: fp32 instead of int4"),
        (("--fp16",), integers(4, floats="fp16"), r"layer up: fp16 instead of int4"),
        ((*INT4, "--fp16"), integers(4, floats="fp16"), r"layer up: fp16 instead of int4"),
        (("--weightQuantBits", "8"), integers(4), r"layer out: int8 instead of int4"),
        (INT4, integers(4, scales="fp16"), r"layer up: fp32 scales instead of fp16"),
        ((*INT4, "--weightQuantScaleBit", "16"), integers(4), r"layer out: fp16 scales instead of fp32"),
        (INT4, integers(8), r"layer down: int4 instead of int8"),
        (INT4, FLOAT32, r"layer up: int4 instead of fp32"),
        (("--fp16",), FLOAT32, r"layer up: fp16 instead of fp32"),
        ((), FLOAT16, r"layer up: fp32 instead of fp16"),
        (INT4, integers(4, symmetric=True), r"layer up: asymmetric instead of symmetric"),
        ((*INT4, SYMMETRIC), integers(4), r"layer up: symmetric instead of asymmetric"),
        ((*INT4, "--hqq"), integers(4, symmetric=True), r"layer up: asymmetric instead of symmetric"),
        (INT4, integers(4, block_size=32), r"layer up: one scale per channel \(64 inputs\) instead of blocks of 32"),
        ((*INT4, "--weightQuantBlock", "24"), integers(4, block_size=32), r"layer down: one scale per channel"),
        (
            (*INT4, "--weightQuantBlock", "32"),
            integers(4, block_size=16),
            r"layer up: blocks of 32 instead of blocks of 16",
        ),
        ((*INT4, "--weightQuantBlock", "32"), integers(4), r"layer up: blocks of 32 instead of one scale per channel"),
        (INT4, integers(4, floats="fp16"), r"embedding table \[50, 64\]: fp32 instead of fp16"),
        (INT4, integers(4, embedding="int8"), r"embedding table \[50, 64\]: fp32 instead of int8"),
        (INT4, integers(4, layers=[{"match": "out", "bits": 8}]), r"layer out: int4 instead of int8"),
        (INT4, integers(4, layers=[{"match": "out", "bits": None}]), r"layer out: int4 instead of fp32"),
    ],
    ids=str,
)
def test_what_was_not_asked_for_is_refused_by_name(
    converter: Converter, graph: Path, flags: tuple[str, ...], recipe: ComponentRecipe, fault: str
) -> None:
    with pytest.raises(ConversionError, match=fault):
        audit(stored(converter, graph, *flags), recipe)


@pytest.mark.parametrize("embedding", ["int8", "int4"])
@pytest.mark.parametrize("floats", ["fp32", "fp16"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_quantised_embedding_is_told_from_one_of_other_bits(
    graph: Path, tmp_path: Path, embedding: str, floats: str, bits: int | None
) -> None:
    recipe = integers(4, embedding=embedding, floats=floats)
    if bits is None:
        recipe = recipe.model_copy(update={"weights": None})
    model = ir.load(graph)
    assert quantise_embedding(model, embedding, half_scales=floats == "fp16") == 1
    ir.save(model, tmp_path / "network.onnx")
    mnn_from_onnx(tmp_path / "network.onnx", tmp_path / "network.mnn", recipe)
    storage = read_storage(tmp_path / "network.mnn")
    assert [table.type for table in audit(storage, recipe).tables] == [embedding]
    for other in {"int8", "int4", "float"} - {embedding}:
        with pytest.raises(ConversionError, match=f"embedding table.*: {embedding} instead of "):
            audit(storage, recipe.model_copy(update={"embedding": other}))


def test_a_rule_that_matches_nothing_is_refused(converter: Converter, graph: Path) -> None:
    recipe = integers(4, layers=[{"match": "sideways", "bits": 8}])
    with pytest.raises(ConversionError, match="'sideways' matches none of the 3"):
        audit(stored(converter, graph, *INT4), recipe)


def test_all_faults_are_told_at_once(converter: Converter, graph: Path) -> None:
    with pytest.raises(ConversionError) as caught:
        audit(stored(converter, graph, "--weightQuantBits", "8"), integers(4, floats="fp16"))
    assert all(name in str(caught.value) for name in ("layer up", "layer down", "layer out", "embedding table"))


def test_a_long_list_of_faults_is_cut(converter: Converter, graph: Path) -> None:
    storage = stored(converter, graph)
    many = replace(storage, operators=storage.operators * 5)
    with pytest.raises(ConversionError, match="and 5 more"):
        audit(many, integers(4))


def test_a_whole_channel_is_enough_when_the_block_is_larger(converter: Converter, graph: Path) -> None:
    storage = stored(converter, graph, *INT4, "--weightQuantBlock", "64")
    assert [weight.block_size for _, weight in storage.weighted()] == [None, 64, None]
    assert audit(storage, integers(4, block_size=64)).quantised == 3
    assert audit(stored(converter, graph, *INT4), integers(4, block_size=256)).quantised == 3


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"rows": 1}, "layer up: 1 scales for 128 output channels"),
        ({"activations_too": True}, "layer up: calculates with integers"),
    ],
    ids=str,
)
def test_forms_that_the_converter_never_gives_are_refused(
    converter: Converter, graph: Path, change: dict[str, Any], fault: str
) -> None:
    storage = stored(converter, graph, *INT4)
    changed = tuple(
        replace(operator, weight=replace(operator.weight, **change)) if operator.weight else operator
        for operator in storage.operators
    )
    with pytest.raises(ConversionError, match=fault):
        audit(replace(storage, operators=changed), integers(4))


def test_a_product_with_a_stacked_constant_is_an_unquantised_weight(converter: Converter, tmp_path: Path) -> None:
    storage = stored(converter, with_product(tmp_path / "product.onnx"), *INT4)
    with pytest.raises(ConversionError, match=r"layer out: its weight stack \[1, 64, 32\] stayed fp32 instead of int4"):
        audit(storage, integers(4))


def test_a_product_with_a_stacked_constant_is_nothing_to_a_float_recipe(converter: Converter, tmp_path: Path) -> None:
    storage = stored(converter, with_product(tmp_path / "product.onnx"))
    assert audit(storage, FLOAT32).layers == 1


def test_a_weight_that_many_products_share_is_an_unquantised_weight(converter: Converter, tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x0", "own"], ["x1"])]
    for step in range(1, 7):
        nodes.append(helper.make_node("MatMul", [f"x{step}", "shared"], [f"y{step}"]))
        nodes.append(helper.make_node("Tanh", [f"y{step}"], [f"x{step + 1}"]))
    constants = {"own": gaussian(64, 64), "shared": gaussian(64, 64, seed=1)}
    graph = save_graph(tmp_path / "shared.onnx", nodes, {"x0": (TensorProto.FLOAT, [1, 8, 64])}, ["x7"], constants)
    with pytest.raises(ConversionError, match=r"its weight shared .* stayed fp32 instead of int4"):
        audit(stored(converter, graph, *INT4), integers(4))


def test_a_model_of_nothing_but_unquantised_products_is_refused_by_name(converter: Converter, tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "stack"], ["out"])]
    inputs = {"x": (TensorProto.FLOAT, [1, 8, 64])}
    graph = save_graph(tmp_path / "stack.onnx", nodes, inputs, ["out"], {"stack": gaussian(1, 64, 32)})
    with pytest.raises(ConversionError, match="layer out: its weight stack"):
        audit(stored(converter, graph, *INT4), integers(4))


def test_a_convolution_whose_weight_is_computed_is_refused(converter: Converter, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "own"], ["y"]),
        helper.make_node("Mul", ["kernel", "gain"], ["scaled"]),
        helper.make_node("Conv", ["y", "scaled"], ["out"], pads=[1, 1]),
    ]
    constants = {"own": gaussian(8, 8), "kernel": gaussian(32, 16, 3)}
    inputs = {"x": (TensorProto.FLOAT, [1, 16, 8]), "gain": (TensorProto.FLOAT, [32, 1, 1])}
    graph = save_graph(tmp_path / "computed.onnx", nodes, inputs, ["out"], constants)
    with pytest.raises(ConversionError, match=r"layer out: its weight .* is computed when it runs"):
        audit(stored(converter, graph, *INT4), integers(4))


def test_a_kernel_that_a_caller_gives_is_no_weight_of_the_model(converter: Converter, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "own"], ["y"]),
        helper.make_node("Add", ["factors", "one"], ["gain"]),
        helper.make_node("Reshape", ["gain", "shape"], ["kernel"]),
        helper.make_node("Conv", ["y", "kernel"], ["out"], group=16),
    ]
    constants = {"own": gaussian(8, 8), "one": np.float32(1), "shape": np.array([16, 1, 1])}
    inputs = {"x": (TensorProto.FLOAT, [1, 16, 8]), "factors": (TensorProto.FLOAT, [16])}
    graph = save_graph(tmp_path / "given.onnx", nodes, inputs, ["out"], constants)
    audit(stored(converter, graph, *INT4), integers(4))


def test_a_convolution_without_weights_is_refused(converter: Converter, graph: Path) -> None:
    storage = stored(converter, graph, "--benchmarkModel")
    emptied = replace(storage, operators=tuple(replace(operator, weight=None) for operator in storage.operators))
    with pytest.raises(ConversionError, match="layer up: holds no weights"):
        audit(emptied, FLOAT32)


def test_a_constant_without_values_is_refused(converter: Converter, graph: Path) -> None:
    storage = stored(converter, graph)
    emptied = replace(storage, constants=tuple(replace(constant, values=None) for constant in storage.constants))
    with pytest.raises(ConversionError, match="has no values"):
        audit(emptied, FLOAT32)


def test_bytes_that_nothing_accounts_for_are_refused(converter: Converter, graph: Path) -> None:
    storage = stored(converter, graph)
    with pytest.raises(ConversionError, match="bytes of the file are neither weights nor constants"):
        audit(replace(storage, bytes=storage.bytes + 200_000), FLOAT32)


def test_float_constants_that_stayed_fp32_are_refused(converter: Converter, tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Mul", ["y", "gains"], ["out"])]
    constants = {"w": gaussian(64, 64), "gains": gaussian(64)}
    graph = save_graph(tmp_path / "gains.onnx", nodes, {"x": (TensorProto.FLOAT, [1, 8, 64])}, ["out"], constants)
    with pytest.raises(ConversionError, match=r"constant gains \[64\]: fp32 instead of fp16"):
        audit(stored(converter, graph, *INT4), integers(4, floats="fp16"))


def test_a_model_without_layers_cannot_be_quantised(converter: Converter, tmp_path: Path) -> None:
    nodes = [helper.make_node("Tanh", ["x"], ["out"])]
    graph = save_graph(tmp_path / "tanh.onnx", nodes, {"x": (TensorProto.FLOAT, [1, 8])}, ["out"], {})
    with pytest.raises(ConversionError, match="has no layers with weights"):
        audit(stored(converter, graph), integers(4))


def test_an_embedding_that_is_not_there_is_missed(converter: Converter, tmp_path: Path) -> None:
    graph = with_product(tmp_path / "product.onnx")
    with pytest.raises(ConversionError, match="no embedding was found, but the recipe stores it as int8"):
        audit(stored(converter, graph), ComponentRecipe(floor_db=1, embedding="int8"))
