from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common

from sa3_convert.errors import ConversionError, ModelFileError
from sa3_convert.ort import OrtSession
from sa3_convert.passes.pipeline import save_onnx
from sa3_convert.passes.split import rules_of_part, split_onnx
from sa3_convert.recipe import ComponentRecipe, LayerRule, WeightScheme
from tests.passes.graphs import graph

RANDOM = np.random.default_rng(0)
WEIGHTS = {name: RANDOM.standard_normal((64, 64)).astype(np.float32) for name in ("A", "B", "C")}
TEXT = """(float[1, N, 64] x, float[1, 5, 64] c, float[1, N] m) => (float[1, N, 64] y) {
    h = MatMul(x, A)
    k = MatMul(c, B)
    s = Sigmoid(k)
    total = ReduceSum<keepdims = 1>(s, axis)
    column = Unsqueeze(m, last)
    doubled = Add(column, column)
    masked = Mul(h, doubled)
    met = Add(masked, total)
    y = MatMul(met, C)
}"""
UNCHANGING = ("c", "m")
AXES = {"axis": np.array([1]), "last": np.array([2])}


def write_whole(path: Path) -> Path:
    model = graph(TEXT, **WEIGHTS, **AXES)
    common.ShapeInferencePass()(model)
    save_onnx(model, path)
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_whole(tmp_path / "whole.onnx")


def names(path: Path) -> tuple[list[str], set[str]]:
    """Return the inputs, and the weights, of an ONNX file."""
    found = onnx.load(path, load_external_data=False).graph
    return [value.name for value in found.input], {tensor.name for tensor in found.initializer} & WEIGHTS.keys()


def test_each_part_has_its_own_inputs_and_weights(whole: Path, tmp_path: Path) -> None:
    handed = split_onnx(whole, {tmp_path / "prepare.onnx": UNCHANGING}, tmp_path / "step.onnx")
    assert handed == ("total",)
    assert names(tmp_path / "prepare.onnx") == (["c"], {"B"})
    # The mask's part costs nothing, so it is computed where it is needed.
    assert names(tmp_path / "step.onnx") == (["x", "m", "total"], {"A", "C"})
    sizes = [(tmp_path / f"{name}.onnx.data").stat().st_size for name in ("prepare", "step", "whole")]
    assert sizes[0] + sizes[1] == sizes[2]


def test_another_tool_cuts_out_the_same_parts(whole: Path, tmp_path: Path) -> None:
    prepare, step = tmp_path / "prepare.onnx", tmp_path / "step.onnx"
    handed = split_onnx(whole, {prepare: UNCHANGING}, step)
    for ours, inputs, outputs in ((prepare, (), handed), (step, handed, ("y",))):
        theirs = gs.import_onnx(onnx.load(whole))
        tensors = theirs.tensors()
        theirs.inputs += [tensors[name] for name in inputs]
        theirs.outputs = [tensors[name] for name in outputs]
        onnx.save(gs.export_onnx(theirs.cleanup(remove_unused_graph_inputs=True)), tmp_path / "theirs.onnx")
        expected, found = (gs.import_onnx(onnx.load(path)) for path in (tmp_path / "theirs.onnx", ours))
        assert [(node.op, node.name) for node in found.nodes] == [(node.op, node.name) for node in expected.nodes]
        for side in ("inputs", "outputs"):
            assert [t.name for t in getattr(found, side)] == [t.name for t in getattr(expected, side)]
        arrays = {t.name: np.ones([3 if n == "N" else n for n in t.shape], np.float32) for t in found.inputs}
        results = [OrtSession(path, threads=1).run(arrays) for path in (ours, tmp_path / "theirs.onnx")]
        for name in outputs:
            np.testing.assert_array_equal(results[0][name], results[1][name], strict=True)


def test_the_weights_of_a_part_stand_in_the_order_of_the_whole(tmp_path: Path) -> None:
    many = {f"W{number}": WEIGHTS["A"] for number in range(12)}
    steps = [f"h{n + 1} = MatMul(h{n}, W{n})" for n in range(12)]
    text = "(float[1, 64] x, float[1, 64] c) => (float[1, 64] y) {{ h0 = Neg(c) {} y = Add(x, h12) }}"
    model = graph(text.format(" ".join(steps)), **many)
    common.ShapeInferencePass()(model)
    save_onnx(model, tmp_path / "whole.onnx")
    split_onnx(tmp_path / "whole.onnx", {tmp_path / "prepare.onnx": UNCHANGING}, tmp_path / "step.onnx")
    found = onnx.load(tmp_path / "prepare.onnx", load_external_data=False).graph
    assert [tensor.name for tensor in found.initializer] == list(many)


@given(length=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_the_parts_in_turn_give_what_the_whole_gives(
    tmp_path_factory: pytest.TempPathFactory, length: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    write_whole(folder / "whole.onnx")
    split_onnx(folder / "whole.onnx", {folder / "prepare.onnx": UNCHANGING}, folder / "step.onnx")
    random = np.random.default_rng(seed)
    shapes = {"x": (1, length, 64), "c": (1, 5, 64), "m": (1, length)}
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    expected = OrtSession(folder / "whole.onnx", threads=1).run(feeds)["y"]
    prepared = OrtSession(folder / "prepare.onnx", threads=1).run({"c": feeds["c"]})
    step = OrtSession(folder / "step.onnx", threads=1)
    np.testing.assert_array_equal(step.run({"x": feeds["x"], "m": feeds["m"], **prepared})["y"], expected)


def test_two_groups_of_inputs_get_a_part_each(tmp_path: Path) -> None:
    text = "(float[1, 64] x, float[1, 64] c, float[1, 64] t) => (float[1, 64] y) {\n"
    text += "k = MatMul(c, A) e = MatMul(t, B) s = Add(k, e) h = MatMul(x, C) y = Add(h, s) }"
    model = graph(text, **WEIGHTS)
    common.ShapeInferencePass()(model)
    save_onnx(model, tmp_path / "whole.onnx")
    paths = [tmp_path / f"{name}.onnx" for name in ("prepare", "time", "step")]
    assert split_onnx(tmp_path / "whole.onnx", {paths[0]: ["c"], paths[1]: ["t"]}, paths[2]) == ("k", "e")
    found = [(["c"], {"A"}), (["t"], {"B"}), (["x", "k", "e"], {"C"})]
    assert [names(path) for path in paths] == found


@pytest.mark.parametrize("inputs", [[], ["m"]])
def test_where_nothing_costly_stays_the_same_nothing_is_written(whole: Path, tmp_path: Path, inputs: list[str]) -> None:
    with pytest.raises(ConversionError, match="cannot be split"):
        split_onnx(whole, {tmp_path / "prepare.onnx": inputs}, tmp_path / "step.onnx")
    assert not (tmp_path / "prepare.onnx").exists()


def test_a_value_of_unknown_shape_is_told(tmp_path: Path) -> None:
    save_onnx(graph(TEXT, **WEIGHTS, **AXES), tmp_path / "whole.onnx")
    with pytest.raises(ConversionError, match="what shape 'total' has"):
        split_onnx(tmp_path / "whole.onnx", {tmp_path / "prepare.onnx": UNCHANGING}, tmp_path / "step.onnx")


def test_the_whole_is_not_changed(whole: Path, tmp_path: Path) -> None:
    before = whole.read_bytes()
    split_onnx(whole, {tmp_path / "prepare.onnx": UNCHANGING}, tmp_path / "step.onnx")
    assert whole.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"no graph"])
def test_a_file_that_is_no_onnx_is_told(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "whole.onnx").write_bytes(content)
    with pytest.raises(ModelFileError):
        split_onnx(tmp_path / "whole.onnx", {tmp_path / "prepare.onnx": UNCHANGING}, tmp_path / "step.onnx")


def test_a_part_gets_the_rules_of_its_own_layers(whole: Path, tmp_path: Path) -> None:
    split_onnx(whole, {tmp_path / "prepare.onnx": UNCHANGING}, tmp_path / "step.onnx")
    rules = (LayerRule(match="^k$", bits=4), LayerRule(match="^[hy]$", bits=6))
    recipe = ComponentRecipe(weights=WeightScheme(bits=8, layers=rules), floor_db=10)
    for part, index in (("prepare", 0), ("step", 1)):
        weights = rules_of_part(recipe, tmp_path / f"{part}.onnx").weights
        assert weights is not None
        assert weights.layers == (rules[index],)
    plain = ComponentRecipe(floor_db=10)
    assert rules_of_part(plain, tmp_path / "step.onnx") is plain
