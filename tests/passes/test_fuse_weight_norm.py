from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from sa3_convert.passes.fuse_weight_norm import fuse_weight_norm
from tests.passes.graphs import checked, graph, run_mnn, run_ort, signal_to_noise_db

RNG = np.random.default_rng(0)
V = RNG.standard_normal((4, 6, 3)).astype(np.float32)
G = RNG.uniform(0.5, 1.5, (4, 1, 1)).astype(np.float32)
X = RNG.standard_normal((1, 6, 10)).astype(np.float32)
AXES = np.array([1, 2])
TWO = np.float32(2)
HALF = np.float32(0.5)
MINUS_HALF = np.float32(-0.5)

SPELLINGS = {
    "ReduceL2, axes input, g·(v/n)": "n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(g, d)",
    "ReduceL2, v·(g/n)": "n = ReduceL2(v, axes)  d = Div(g, n)  w = Mul(v, d)",
    "ReduceL2, (g·v)/n": "n = ReduceL2(v, axes)  d = Mul(g, v)  w = Div(d, n)",
    "ReduceL2, Reciprocal": "n = ReduceL2(v, axes)  r = Reciprocal(n)  d = Mul(v, r)  w = Mul(d, g)",
    "Mul, ReduceSum, Sqrt": "q = Mul(v, v)  s = ReduceSum(q, axes)  n = Sqrt(s)  d = Div(g, n)  w = Mul(v, d)",
    "Pow, ReduceSum, Sqrt": "q = Pow(v, two)  s = ReduceSum(q, axes)  n = Sqrt(s)  d = Div(v, n)  w = Mul(d, g)",
    "Pow, ReduceSum, Pow": "q = Pow(v, two)  s = ReduceSum(q, axes)  n = Pow(s, half)  d = Div(v, n)  w = Mul(d, g)",
    "inverse square root": "q = Mul(v, v)  s = ReduceSum(q, axes)  r = Pow(s, mhalf)  d = Mul(v, r)  w = Mul(d, g)",
    "ReduceSumSquare": "s = ReduceSumSquare(v, axes)  n = Sqrt(s)  d = Div(v, n)  w = Mul(d, g)",
    "absolute values": "a = Abs(v)  q = Mul(a, a)  s = ReduceSum(q, axes)  n = Sqrt(s)  d = Div(g, n)  w = Mul(v, d)",
    "Cast and Identity": (
        "c = Cast<to = 11>(v)  q = Mul(c, c)  s = ReduceSum(q, axes)  n = Sqrt(s)  f = Cast<to = 1>(n)"
        "  i = Identity(v)  d = Div(i, f)  w = Mul(d, g)"
    ),
    "exponent as a Constant node": (
        "k = Constant<value = float {2.0}>()  q = Pow(v, k)  s = ReduceSum(q, axes)  n = Sqrt(s)"
        "  d = Div(v, n)  w = Mul(d, g)"
    ),
    "transposed there and back": (
        "t = Transpose<perm = [1, 2, 0]>(v)  n = ReduceL2<keepdims = 0>(t, front)  m = Reshape(n, column)"
        "  d = Div(v, m)  w = Mul(d, g)"
    ),
}


def conv(weight: str, **replaced: NDArray[np.generic]) -> ir.Model:
    lines = weight.replace("  ", "\n")
    constants = {"v": V, "g": G, "axes": AXES, "two": TWO, "half": HALF, "mhalf": MINUS_HALF}
    constants |= {"front": np.array([0, 1]), "column": np.array([-1, 1, 1])} | replaced
    used = {name: array for name, array in constants.items() if f"{name}" in lines}
    return graph(f"(float[1, 6, N] x) => (float[1, 4, N] y) {{ {lines}\n y = Conv<pads = [1, 1]>(x, w) }}", **used)


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_each_spelling_becomes_one_constant_with_the_same_output(spelling: str) -> None:
    model = conv(spelling)
    (before,) = run_ort(model, {"x": X})
    assert fuse_weight_norm(model) == 1
    (after,) = run_ort(model, {"x": X})
    assert [node.op_type for node in model.graph] == ["Conv"]
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6, strict=True)


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_another_tool_folds_each_spelling_to_the_same_constant(spelling: str) -> None:
    model = conv(spelling)
    theirs = gs.import_onnx(ir.to_proto(model)).fold_constants().cleanup()
    fuse_weight_norm(model)
    ours = gs.import_onnx(ir.to_proto(model))
    assert [node.op for node in ours.nodes] == [node.op for node in theirs.nodes] == ["Conv"]
    assert [[t.name for t in graph.outputs] for graph in (ours, theirs)] == [["y"], ["y"]]
    weights = [graph.nodes[0].inputs[1].values for graph in (ours, theirs)]
    np.testing.assert_allclose(weights[0], weights[1], rtol=0, atol=2e-6, strict=True)


def test_v_and_g_leave_the_graph() -> None:
    model = conv(SPELLINGS["Mul, ReduceSum, Sqrt"])
    fuse_weight_norm(model)
    (weight,) = model.graph.initializers.values()
    assert weight.shape == V.shape


def test_the_weight_is_called_after_the_parameter() -> None:
    model = conv(SPELLINGS["Mul, ReduceSum, Sqrt"])
    model.graph.initializers["v"].name = "mapping.weight_v"
    fuse_weight_norm(model)
    assert list(model.graph.initializers) == ["mapping.weight"]


def test_a_second_run_finds_nothing() -> None:
    model = conv(SPELLINGS["ReduceL2, v·(g/n)"])
    assert [fuse_weight_norm(model), fuse_weight_norm(model)] == [1, 0]


def test_reshaping_behind_the_weight_is_folded_too() -> None:
    v, g = V[:, :, 0].copy(), G[:, :, 0].copy()
    model = graph(
        """(float[2, 6] x) => (float[2, 4] y) {
        n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(d, g)  t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t) }""",
        v=v,
        g=g,
        axes=np.array([1]),
    )
    x = X[0].T[:2].copy()
    (before,) = run_ort(model, {"x": x})
    assert fuse_weight_norm(model) == 1
    assert [node.op_type for node in model.graph] == ["MatMul"]
    np.testing.assert_allclose(run_ort(model, {"x": x})[0], before, rtol=0, atol=2e-6, strict=True)


def test_two_convolutions_that_share_a_weight_share_the_constant() -> None:
    model = graph(
        """(float[1, 6, N] x) => (float[1, 4, N] y, float[1, 4, N] z) {
        n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(d, g)
        y = Conv<pads = [1, 1]>(x, w)  a = Neg(x)  z = Conv<pads = [1, 1]>(a, w) }""",
        v=V,
        g=G,
        axes=AXES,
    )
    assert fuse_weight_norm(model) == 1
    checked(model)
    assert len(model.graph.initializers) == 1


NOT_WEIGHT_NORMS = {
    "norm over the kernel alone": ("n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(g, d)", {"axes": np.array([2])}),
    "norm over everything": ("n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(g, d)", {"axes": np.array([0, 1, 2])}),
    "norm over the outputs": ("n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(g, d)", {"axes": np.array([0])}),
    "no square root": ("q = Mul(v, v)  s = ReduceSum(q, axes)  d = Div(v, s)  w = Mul(d, g)", {}),
    "cubes instead of squares": (
        "q = Pow(v, two)  s = ReduceSum(q, axes)  n = Sqrt(s)  d = Div(v, n)  w = Mul(d, g)",
        {"two": np.float32(4)},
    ),
    "a channel of zeros": (
        "n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(g, d)",
        {"v": np.concatenate((V[:3], 0 * V[:1]))},
    ),
    "no magnitude": ("n = ReduceL2(v, axes)  w = Div(v, n)", {}),
    "no norm": ("w = Mul(v, g)", {}),
}


@pytest.mark.parametrize(("weight", "replaced"), NOT_WEIGHT_NORMS.values(), ids=NOT_WEIGHT_NORMS.keys())
def test_what_is_not_weight_norm_stays(weight: str, replaced: dict[str, NDArray[np.generic]]) -> None:
    model = conv(weight, **replaced)
    before = [node.op_type for node in model.graph]
    assert fuse_weight_norm(model) == 0
    assert [node.op_type for node in model.graph] == before


def test_a_direction_computed_at_run_time_stays() -> None:
    model = graph(
        """(float[1, 6, N] x, float[4, 6, 3] v) => (float[1, 4, N] y) {
        n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(d, g)  y = Conv<pads = [1, 1]>(x, w) }""",
        g=G,
        axes=AXES,
    )
    assert fuse_weight_norm(model) == 0


def test_an_initialiser_that_callers_can_override_stays() -> None:
    model = graph(
        """(float[1, 6, N] x, float[4, 6, 3] v) => (float[1, 4, N] y) {
        n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(d, g)  y = Conv<pads = [1, 1]>(x, w) }""",
        v=V,
        g=G,
        axes=AXES,
    )
    assert fuse_weight_norm(model) == 0


def test_a_norm_that_is_used_elsewhere_stays() -> None:
    model = graph(
        """(float[1, 6, N] x) => (float[1, 4, N] y, float[4, 1, 1] z) {
        n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(d, g)  y = Conv<pads = [1, 1]>(x, w)  z = Neg(n) }""",
        v=V,
        g=G,
        axes=AXES,
    )
    assert fuse_weight_norm(model) == 0


def test_a_norm_that_is_a_graph_output_stays() -> None:
    model = graph(
        """(float[1, 6, N] x) => (float[1, 4, N] y, float[4, 1, 1] n) {
        n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(d, g)  y = Conv<pads = [1, 1]>(x, w) }""",
        v=V,
        g=G,
        axes=AXES,
    )
    assert fuse_weight_norm(model) == 0


def test_mnn_is_right_on_the_fused_weight_only(tmp_path: Path) -> None:
    model = conv(SPELLINGS["ReduceL2, v·(g/n)"])
    (reference,) = run_ort(model, {"x": X})
    (unfused,) = run_mnn(model, {"x": X}, tmp_path)
    fuse_weight_norm(model)
    (fused,) = run_mnn(model, {"x": X}, tmp_path)
    assert signal_to_noise_db(reference, unfused.reshape(reference.shape)) < 20
    assert signal_to_noise_db(reference, fused.reshape(reference.shape)) > 110
