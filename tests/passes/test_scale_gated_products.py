from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sa3_convert.components import Component
from sa3_convert.passes.pipeline import apply_passes
from sa3_convert.passes.scale_gated_products import LARGEST_BOUND, gated_products, scale_gated_products
from sa3_convert.recipe import ComponentRecipe, WeightScheme
from tests.passes.graphs import graph, run_mnn, run_ort, signal_to_noise_db

RNG = np.random.default_rng(0)
D, INNER = 32, 48
NORM = """p{n} = Pow({x}, two)  m{n} = ReduceMean<keepdims = 1>(p{n}, axes)  e{n} = Add(m{n}, eps)  s{n} = Sqrt(e{n})
    r{n} = Reciprocal(s{n})  n{n} = Mul({x}, r{n})  o{n} = Mul(n{n}, gamma{n})"""
GELU = """k = Pow(g, three)  l = Mul(c, k)  a = Add(g, l)  b = Mul(root, a)  t = Tanh(b)  f = Add(t, one)
    h = Mul(half, f)  w = Mul(g, h)"""
SILU = "h = Sigmoid(g)  w = Mul(g, h)"
MLP = """(float[1, 5, 32] x) => (float[1, 5, 32] y) {
    BEFORE  g = MatMul(o1, wg)  ACTIVATION  u = MatMul(o1, wu)  product = Mul(w, u)  z = MatMul(product, wd)
    AFTER  y = Identity(o2) }"""
TEXT = MLP.replace("BEFORE", NORM.format(n=1, x="x")).replace("AFTER", NORM.format(n=2, x="z"))


def mlp(size: float = 1.0, activation: str = GELU, text: str = TEXT, **changed: Any) -> ir.Model:
    constants = {
        "two": np.float32(2),
        "three": np.float32(3),
        "axes": np.array([-1]),
        "eps": np.float32(1e-6),
        "c": np.float32(0.044715),
        "root": np.float32(0.7978846),
        "one": np.float32(1),
        "half": np.float32(0.5),
        "gamma1": RNG.uniform(0.5, 2, D).astype(np.float32),
        "gamma2": RNG.uniform(0.5, 2, D).astype(np.float32),
        "wg": (size * RNG.standard_normal((D, INNER))).astype(np.float32),
        "wu": (size * RNG.standard_normal((D, INNER))).astype(np.float32),
        "wd": RNG.standard_normal((INNER, D)).astype(np.float32),
    }
    constants = {name: value for name, value in constants.items() if activation is GELU or name not in ("three", "c")}
    return graph(text.replace("ACTIVATION", activation), **(constants | changed))


def product_of(model: ir.Model, x: dict[str, NDArray[Any]]) -> NDArray[Any]:
    copy = model.clone()
    (value,) = (out for node in copy.graph for out in node.outputs if out.name == "product")
    value.shape, value.dtype = ir.Shape([1, 5, INNER]), ir.DataType.FLOAT
    copy.graph.outputs.append(value)
    return run_ort(copy, x)[1]


def feeds(size: float = 1.0) -> dict[str, NDArray[Any]]:
    return {"x": (size * RNG.standard_normal((1, 5, D))).astype(np.float32)}


@pytest.mark.parametrize("activation", [GELU, SILU])
def test_the_result_is_the_same_bit_for_bit_and_the_product_fits_half(activation: str) -> None:
    model, x = mlp(20, activation), feeds()
    (before,) = run_ort(model, x)
    assert np.abs(product_of(model, x)).max() > 65504
    assert scale_gated_products(model) == 1
    np.testing.assert_array_equal(run_ort(model, x)[0], before)
    assert np.abs(product_of(model, x)).max() < LARGEST_BOUND


@settings(deadline=None, max_examples=20)
@given(st.floats(0.1, 60), st.floats(1e-3, 1e4), st.integers(0, 2**31))
def test_no_input_leaves_the_bound(size: float, scale: float, seed: int) -> None:
    model = mlp(size)
    (found,) = gated_products(model)
    x = (scale * np.random.default_rng(seed).standard_normal((1, 5, D))).astype(np.float32)
    assert np.abs(product_of(model, {"x": x})).max() <= found.bound


def test_the_worst_input_comes_near_the_bound() -> None:
    gate = np.zeros((D, INNER), np.float32)
    gate[:, 0] = 9
    model = mlp(wg=gate, wu=gate, gamma1=np.ones(D, np.float32))
    (found,) = gated_products(model)
    assert np.abs(product_of(model, {"x": np.ones((1, 5, D), np.float32)})).max() > 0.99 * found.bound


def test_what_fits_already_stays() -> None:
    assert scale_gated_products(mlp(1)) == 0


def test_it_is_not_scaled_twice() -> None:
    model = mlp(20)
    assert [scale_gated_products(model), scale_gated_products(model)] == [1, 0]


def test_the_norm_before_keeps_its_eps() -> None:
    model = mlp(20)
    scale_gated_products(model)
    used = {node.outputs[0].name: node.inputs[1] for node in model.graph if node.op_type == "Add"}
    assert {name: getattr(used[name], "name", None) for name in ("e1", "e2")} == {"e1": "eps", "e2": "e2.scaled_eps"}


@pytest.mark.parametrize(
    "text",
    [
        TEXT.split(NORM.format(n=2, x="z"))[0] + "y = Identity(z) }",
        TEXT.replace("y = Identity(o2)", "y = Add(o2, z)"),
        TEXT.replace("u = MatMul(o1, wu)", "u = MatMul(x, wu)"),
        TEXT.replace("z = MatMul(product, wd)", "q = Add(product, u)  z = MatMul(q, wd)"),
        TEXT.replace("y = Identity(o2)", "v = MatMul(x, wu)  i = ReduceMax<keepdims = 1>(v, axes)  y = Add(o2, i)"),
        TEXT.replace("y) {", "y, float[1, 5, 48] product) {", 1),
    ],
    ids=["no norm behind", "used beside", "no norm before", "not a product alone", "weight used twice", "an output"],
)
def test_other_structures_stay(text: str) -> None:
    assert scale_gated_products(mlp(20, text=text)) == 0


def test_an_unbounded_activation_stays() -> None:
    assert scale_gated_products(mlp(20, "h = Softplus(g)  w = Mul(g, h)")) == 0


def test_mnn_agrees_with_half_constants_too(tmp_path: Path) -> None:
    model, x = mlp(20), feeds()
    reference = run_ort(model, x)[0]
    apply_passes(model, Component.TEXT_ENCODER, ComponentRecipe(floats="fp16", floor_db=1))
    target = run_mnn(model, x, tmp_path, "--fp16")[0]
    assert signal_to_noise_db(reference, target) > 55


def test_the_grid_of_quantised_weights_moves_along() -> None:
    recipe = ComponentRecipe(weights=WeightScheme(bits=8, rounding="least_squares"), floor_db=1)
    x = feeds()
    plain, scaled = mlp(20), mlp(20)
    for name in ("wg", "wu", "wd", "gamma1", "gamma2"):
        scaled.graph.initializers[name].const_value = plain.graph.initializers[name].const_value
    report = apply_passes(scaled, Component.TEXT_ENCODER, recipe)
    assert report.counts()["scale_gated_products"] == 1
    reference = run_ort(plain, x)[0]
    assert signal_to_noise_db(reference, run_ort(scaled, x)[0]) > 36
