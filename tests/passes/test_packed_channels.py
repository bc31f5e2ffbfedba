"""Linears with elementwise operators between them, as convolutions: the same numbers, fewer copies."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sa3_convert.passes.hazards import find_hazards
from sa3_convert.passes.spellings import keep_channels_packed
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
