"""Linears with elementwise operators between them, as convolutions: the same numbers, fewer copies."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sa3_convert.passes.hazards import find_hazards
from sa3_convert.passes.packed_channels import keep_channels_packed
from tests.passes.graphs import graph, run_mnn, run_ort, signal_to_noise_db

RNG = np.random.default_rng(0)
GATED = """(float[2, N, 16] x) => (float[2, N, 16] y) <float[2, N, 64] a, float[2, N, 64] h, float[2, N, 32] value,
    float[2, N, 32] gate, float[2, N, 32] s, float[2, N, 32] g, float[2, N, 32] p, float[2, N, 16] z> {
    a = MatMul(x, w1)  h = Add(a, b1)  value, gate = Split<axis = -1, num_outputs = 2>(h)
    ACTIVATION  p = Mul(value, g)  z = MatMul(p, w2)  y = Add(z, b2) }"""
SILU = "s = Sigmoid(gate)  g = Mul(gate, s)"
SINE = "s = Mul(gate, pi)  g = Sin(s)"
PLAIN = """(float[1, 5, 16] x) => (float[1, 5, 16] y) <float[1, 5, 32] a, float[1, 5, 32] s, float[1, 5, 32] g> {
    a = MatMul(x, w1)  s = Sigmoid(a)  g = Mul(a, s)  y = MatMul(g, w2) }"""


def weights(inner: int, outer: int) -> dict[str, np.ndarray]:
    shapes = {"w1": (16, inner), "b1": (inner,), "w2": (outer, 16), "b2": (16,)}
    return {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gated(activation: str = SILU, text: str = GATED) -> ir.Model:
    numbers = {"pi": np.float32(np.pi)} if activation is SINE else {}
    return graph(text.replace("ACTIVATION", activation), **weights(64, 32), **numbers)


@pytest.mark.parametrize("activation", [SILU, SINE])
def test_a_gated_feed_forward_gives_the_same_on_both_runtimes(activation: str, tmp_path: Path) -> None:
    model, x = gated(activation), {"x": RNG.standard_normal((2, 7, 16)).astype(np.float32)}
    (before,) = run_ort(model, x)
    assert keep_channels_packed(model) == 2
    assert [node.op_type for node in model.graph if node.op_type in ("MatMul", "Add", "Conv")] == ["Conv", "Conv"]
    np.testing.assert_allclose(run_ort(model, x)[0], before, rtol=1e-5, atol=1e-4)
    assert signal_to_noise_db(before, run_mnn(model, x, tmp_path)[0]) > 110
    assert find_hazards(model) == []


def test_layers_keep_the_names_that_rules_match() -> None:
    model = gated()
    keep_channels_packed(model)
    names = [node.outputs[0].name for node in model.graph if node.op_type == "Conv"]
    assert names == ["h__matmul_converted", "y__matmul_converted"]


def test_linears_without_a_bias_are_found() -> None:
    model, x = (
        graph(PLAIN, **{k: v for k, v in weights(32, 32).items() if "b" not in k}),
        RNG.standard_normal((1, 5, 16)),
    )
    feeds = {"x": x.astype(np.float32)}
    (before,) = run_ort(model, feeds)
    assert keep_channels_packed(model) == 2
    np.testing.assert_allclose(run_ort(model, feeds)[0], before, rtol=1e-5, atol=1e-4)


SOFTMAX = "c = Softmax<axis = -1>(g)  p = Mul(value, c)"
PER_CHANNEL = "c = Mul(value, g)  p = Mul(c, b3)"


@pytest.mark.parametrize("between", [SOFTMAX, PER_CHANNEL])
def test_other_operators_in_between_stay(between: str) -> None:
    own = {"b3": np.ones(32, np.float32)} if between is PER_CHANNEL else {}
    text = GATED.replace("ACTIVATION", SILU).replace("p = Mul(value, g)", between)
    assert keep_channels_packed(graph(text, **weights(64, 32), **own)) == 0


def test_a_value_that_is_used_elsewhere_keeps_its_layout() -> None:
    text = GATED.replace("(float[2, N, 16] y)", "(float[2, N, 16] y, float[2, N, 32] p)").replace(
        ", float[2, N, 32] p,", ","
    )
    assert keep_channels_packed(gated(text=text)) == 0


def test_a_split_over_the_length_stays() -> None:
    text = """(float[1, 8, 16] x) => (float[1, 4, 16] y) <float[1, 8, 32] a, float[1, 4, 32] u, float[1, 4, 32] v,
        float[1, 4, 32] p> { a = MatMul(x, w1)  u, v = Split<axis = 1, num_outputs = 2>(a)  p = Mul(u, v)
        y = MatMul(p, w2) }"""
    model = graph(text, **{name: value for name, value in weights(32, 32).items() if "b" not in name})
    assert keep_channels_packed(model) == 0


def slotted(name: str, x: str, width: int, *, bias: bool) -> tuple[str, str]:
    """Return a linear with a slot of rank 4 that gives `name` of `x`, and the types of what is in between."""
    low, outer = f"{name}l", f"{name}b"
    types = [f"float[1, N, {width}] {name}{part}" for part in "pst"]
    types += [f"float[1, N, 4] {low}", f"float[1, N, {16 if name == 'h' else 32}] {name}r"]
    lines = f"{name}r = Mul({x}, {name}rho)  {name}p = MatMul({name}r, {name}w)  {name}s = Mul({name}p, {name}sigma)  "
    lines += f"{low} = MatMul({x}, {name}a)  "
    if bias:
        lines += (
            f"{name}q = Pad<mode = 'constant'>({low}, pads, one)  {name}c = Concat<axis = 0>({outer}, {name}bias)  "
        )
        types += [f"float[1, N, 5] {name}q", f"float[5, {width}] {name}c"]
        low, outer = f"{name}q", f"{name}c"
    return f"{lines}{name}t = MatMul({low}, {outer})  {name} = Add({name}s, {name}t)", ", ".join(types)


INNER, OUTER = slotted("h", "x", 64, bias=True), slotted("y", "p", 16, bias=False)
SLOTS = """float[16] hrho, float[64] hsigma, float[16, 4] ha, float[4, 64] hb,
    float[32] yrho, float[16] ysigma, float[32, 4] ya, float[4, 16] yb"""
ADAPTED = f"""(float[1, N, 16] x, {SLOTS}) => (float[1, N, 16] y) <float[1, N, 64] h, {INNER[1]}, {OUTER[1]},
    float[1, N, 32] value, float[1, N, 32] gate, float[1, N, 32] s, float[1, N, 32] g, float[1, N, 32] p> {{
    {INNER[0]}  value, gate = Split<axis = -1, num_outputs = 2>(h)  s = Sigmoid(gate)  g = Mul(gate, s)
    p = Mul(value, g)  {OUTER[0]} }}"""


def adapted(text: str = ADAPTED) -> ir.Model:
    return graph(
        text.replace("'", '"'),
        hw=RNG.standard_normal((16, 64)).astype(np.float32),
        hbias=RNG.standard_normal((1, 64)).astype(np.float32),
        hline=RNG.standard_normal(64).astype(np.float32),
        first=np.array([0]),
        yw=RNG.standard_normal((32, 16)).astype(np.float32),
        pads=np.array([0, 0, 0, 0, 0, 1]),
        one=np.float32(1),
    )


def feeds_of(model: ir.Model) -> dict[str, np.ndarray]:
    found = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        shape = [size if isinstance(size, int) else 7 for size in value.shape]
        found[str(value.name)] = RNG.standard_normal(shape).astype(np.float32)
    return found


# Of true-size layers the bias is too large to be folded into a row.
UNFOLDED = ADAPTED.replace(
    "hc = Concat<axis = 0>(hb, hbias)", "hd = Unsqueeze(hline, first)  hc = Concat<axis = 0>(hb, hd)"
)


@pytest.mark.parametrize("text", [ADAPTED, UNFOLDED.replace("float[5, 64] hc", "float[1, 64] hd, float[5, 64] hc")])
def test_slots_in_a_feed_forward_give_the_same_on_both_runtimes_and_stay_packed(text: str, tmp_path: Path) -> None:
    model = adapted(text)
    feeds = feeds_of(model)
    (before,) = run_ort(model, feeds)
    assert keep_channels_packed(model) == 2
    kinds = [node.op_type for node in model.graph]
    assert not {"MatMul", "Pad", "Concat"}.intersection(kinds)
    # Of each linear: factors before and behind, W, A, B; one transposition into the first, one out of the second.
    assert kinds.count("Conv") == 10
    whole = [
        node for node in model.graph if node.op_type == "Transpose" and len(node.attributes["perm"].as_ints()) == 3
    ]
    assert [[*node.attributes["perm"].as_ints()] for node in whole] == [[0, 2, 1]] * 2
    assert signal_to_noise_db(before, run_ort(model, feeds)[0]) > 120
    assert signal_to_noise_db(before, run_mnn(model, feeds, tmp_path)[0]) > 110
    assert find_hazards(model) == []
    names = [node.outputs[0].name for node in model.graph if node.op_type == "Conv"]
    assert [name for name in names if "matmul_converted" in str(name)] == [
        "hp__matmul_converted",
        "yp__matmul_converted",
    ]


ALONE = (
    ADAPTED.replace("s = Sigmoid(gate)", "s = Softmax(gate)"),
    ADAPTED.replace("(float[1, N, 16] y)", "(float[1, N, 16] y, float[1, N, 32] p)").replace(
        ", float[1, N, 32] p>", ">"
    ),
)


@pytest.mark.parametrize("text", ALONE)
def test_linears_with_slots_are_packed_alone_where_others_stand_between(text: str) -> None:
    model = adapted(text)
    feeds = feeds_of(model)
    before = run_ort(model, feeds)
    assert keep_channels_packed(model) == 2
    assert not any(node.op_type == "MatMul" for node in model.graph)
    for expected, found in zip(before, run_ort(model, feeds), strict=True):
        assert signal_to_noise_db(expected, found) > 120


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hl = MatMul(x, ha)", "hz = Sigmoid(x)  hl = MatMul(hz, ha)"),
        ("float[16] hrho", "float[1, 1, 16] hrho"),
        ("hs = Mul(hp, hsigma)", "hs = Mul(hp, hp)"),
    ],
)
def test_what_only_resembles_a_slot_stays(old: str, new: str) -> None:
    text = ADAPTED.replace(old, new).replace("<float[1, N, 64] h,", "<float[1, N, 16] hz, float[1, N, 64] h,")
    text = text if "hz" in new else text.replace("float[1, N, 16] hz, ", "")
    model = adapted(text)
    assert keep_channels_packed(model) == 1
    assert {"hp"} <= {value.name for node in model.graph if node.op_type == "MatMul" for value in node.outputs}
