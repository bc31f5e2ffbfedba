import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from sa3_convert.errors import ConversionError
from sa3_convert.passes.half import (
    HALF_NORMAL,
    check_halves,
    compute_in_half,
    exact_parts,
    is_exact_in_half,
    round_to_half,
)
from tests.passes.graphs import graph, run_ort

FLOATS = st.floats(-1e9, 1e9, width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@given(arrays(np.float32, array_shapes(max_dims=2, max_side=5), elements=FLOATS))
def test_the_parts_of_any_array_add_up_to_it_exactly(array: NDArray[np.float32]) -> None:
    parts = exact_parts(array)
    total = sum((np.ldexp(part.astype(np.float64), exponent) for part, exponent in parts), np.zeros(array.shape))
    np.testing.assert_array_equal(total.astype(np.float32), array)


@given(arrays(np.float32, array_shapes(max_dims=2, max_side=5), elements=FLOATS))
def test_each_part_is_zero_or_a_normal_half(array: NDArray[np.float32]) -> None:
    for part, _ in exact_parts(array):
        np.testing.assert_array_equal(part.astype(np.float16).astype(np.float32), part)
        assert (np.abs(part[part != 0]) >= HALF_NORMAL).all()


def test_adding_the_parts_in_float32_rounds_nothing() -> None:
    array = (2 * np.pi * np.geomspace(0.5, 10000, 128)).astype(np.float32)
    total = np.zeros_like(array)
    for part, exponent in exact_parts(array):
        total += part * np.float32(2.0**exponent)
    np.testing.assert_array_equal(total, array)


@pytest.mark.parametrize("array", [np.geomspace(0.5, 10000, 128), 10000.0 ** -(np.arange(32) / 32), [np.pi], [-1e9]])
def test_three_parts_do_for_frequencies(array: NDArray[np.float64]) -> None:
    assert len(exact_parts(np.asarray(array, np.float32))) <= 3


def test_an_exact_number_is_its_only_part() -> None:
    ((part, exponent),) = exact_parts(np.array([384.0], np.float32))
    assert part[0] * 2.0**exponent == 384


def test_infinity_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="finite"):
        exact_parts(np.array([np.inf], np.float32))


@pytest.mark.parametrize(
    ("number", "exact"),
    [(0.0, True), (1.5, True), (65504.0, True), (65505.0, False), (np.pi, False), (1e-6, False), (2.0**-20, False)],
)
def test_exactness_in_half_is_recognised(number: float, exact: bool) -> None:
    assert is_exact_in_half(np.array([number], np.float32)) is exact


def test_weights_are_rounded_to_nearest_when_they_are_read() -> None:
    weight = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    model = graph("(float[1, 40] x) => (float[1, 30] y) { y = MatMul(x, w) }", w=weight)
    assert round_to_half(model) == 1
    rounded = model.graph.initializers["w"].const_value
    assert rounded is not None
    np.testing.assert_array_equal(rounded.numpy(), weight.astype(np.float16).astype(np.float32))


def test_numbers_beyond_half_are_not_made_infinite() -> None:
    model = graph("(float[2] x) => (float[2] y) { y = Add(x, b) }", b=np.array([1e9, -np.inf], np.float32))
    round_to_half(model)
    rounded = model.graph.initializers["b"].const_value
    assert rounded is not None
    np.testing.assert_array_equal(rounded.numpy(), np.array([1e9, -np.inf], np.float32))


def test_integers_are_left_alone() -> None:
    model = graph("(float[4] x) => (float[2, 2] y) { y = Reshape(x, s) }", s=np.array([2, 2]))
    assert round_to_half(model) == 0


def a_block() -> ir.Model:
    """A phase and its sine, a product with a weight, what only moves numbers, another product, a norm."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("w", (8, 6)), ("u", (6, 4)))}
    text = """(float[3, 1] t) => (float[3, 4] out) {
        phase = MatMul(t, frequencies)
        sine = Sin(phase)
        wide = MatMul(sine, w)
        flipped = Transpose <perm = [1, 0]> (wide)
        back = Transpose <perm = [1, 0]> (flipped)
        narrow = MatMul(back, u)
        probability = Softmax(narrow)
        out = Add(probability, narrow)
    }"""
    return graph(text, frequencies=np.geomspace(1, 1e4, 8, dtype=np.float32)[None], **weights)


def test_products_compute_with_halves_and_phases_do_not() -> None:
    feeds = {"t": np.array([[0.1], [0.7], [0.9]], np.float32)}
    model = a_block()
    (exact,) = run_ort(a_block(), feeds)
    assert compute_in_half(model) == 2
    check_halves(model)
    types = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert {name for name, dtype in types.items() if dtype == ir.DataType.FLOAT16} >= {"wide", "flipped", "narrow"}
    assert types["phase"] == types["sine"] == types["probability"] == types["out"] == ir.DataType.FLOAT
    # Between two products nothing is cast: into halves once, and out of them once.
    assert sum(node.op_type == "Cast" for node in model.graph) == 2
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    assert model.graph.initializers["frequencies"].dtype == ir.DataType.FLOAT
    (halves,) = run_ort(model, feeds)
    assert halves.dtype == np.float32
    error = np.linalg.norm(halves - exact) / np.linalg.norm(exact)
    assert 0 < error < 2e-3


def test_an_output_that_a_product_makes_keeps_its_name_and_type() -> None:
    weight = np.eye(4, dtype=np.float32)
    model = graph("(float[2, 4] x) => (float[2, 4] out) { out = MatMul(x, w) }", w=weight)
    compute_in_half(model)
    (output,) = model.graph.outputs
    assert (output.name, output.dtype) == ("out", ir.DataType.FLOAT)
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(run_ort(model, {"x": x})[0], x)


def test_a_weight_that_others_read_too_stays_float32_for_them() -> None:
    weight = np.full((4, 4), np.float32(1 / 3))
    text = "(float[4, 4] x) => (float[4, 4] out) { y = MatMul(x, w) z = Sin(w) out = Add(y, z) }"
    model = graph(text, w=weight)
    assert compute_in_half(model) == 1
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT
    (out,) = run_ort(model, {"x": np.zeros((4, 4), np.float32)})
    np.testing.assert_allclose(out, np.sin(weight), rtol=1e-6)


def test_a_weight_beyond_halfs_range_is_refused() -> None:
    model = graph("(float[1, 2] x) => (float[1, 2] out) { out = MatMul(x, w) }", w=np.full((2, 2), 7e4, np.float32))
    compute_in_half(model)
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    with pytest.raises(ConversionError, match="does not fit float16"):
        tensor.numpy()


def test_a_model_without_halves_is_not_taken_for_one() -> None:
    with pytest.raises(ConversionError, match="float32 weights"):
        check_halves(a_block())
