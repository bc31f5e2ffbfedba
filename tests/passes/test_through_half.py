"""Half arithmetic, emulated: every number is rounded, and what that does to Fourier features shows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.ort import OrtSession
from sa3_convert.passes.half import pass_through_half
from sa3_convert.passes.pipeline import passed_through_half, save_onnx
from sa3_convert.recipe import ComponentRecipe, WeightScheme
from tests.passes.graphs import graph

RANDOM = np.random.default_rng(0)
HALF = np.float16


def outputs(folder: Path, text: str, feeds: Arrays, **constants: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Run a graph whose numbers pass through halves, with the optimisations that a conversion runs it with."""
    model = graph(text, **constants)
    pass_through_half(model)
    save_onnx(model, folder / "half.onnx")
    return OrtSession(folder / "half.onnx", threads=1).run(feeds)


def test_inputs_constants_and_each_operators_output_are_rounded(tmp_path: Path) -> None:
    x, w, b = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((3, 8), (8, 300), 300))
    text = "(float[3, 8] x) => (float[3, 300] y) { a = Mul(x, x) m = MatMul(a, w) y = Add(m, b) }"
    found = outputs(tmp_path, text, {"x": x}, w=w, b=b)["y"]
    squares = (x.astype(HALF).astype(np.float32) ** 2).astype(HALF).astype(np.float32)
    product = (squares @ w.astype(HALF).astype(np.float32)).astype(HALF).astype(np.float32)
    np.testing.assert_allclose(found, product + b.astype(HALF), rtol=2.0**-10, atol=2.0**-10)
    # Where nothing is added up the emulation is exact.
    text = "(float[3, 8] x) => (float[3, 8] y) { a = Mul(x, x) y = Neg(a) }"
    np.testing.assert_array_equal(outputs(tmp_path, text, {"x": x})["y"], -squares)


def test_phases_of_a_large_number_are_gone(tmp_path: Path) -> None:
    text = "(float[1] t) => (float[1] y) { p = Mul(t, f) y = Cos(p) }"
    t = np.array([0.3337], np.float32)
    found = outputs(tmp_path, text, {"t": t}, f=np.array([6e4], np.float32))["y"][0]
    assert abs(found - np.cos(0.3337 * 6e4)) > 0.01
    assert found == np.cos((t.astype(HALF).astype(np.float32) * np.float32(HALF(6e4))).astype(HALF).astype(np.float32))


def test_what_leaves_the_range_of_half_is_infinite(tmp_path: Path) -> None:
    text = "(float[2] x) => (float[2] y) { a = Mul(x, x) y = Sqrt(a) }"
    assert outputs(tmp_path, text, {"x": np.array([240, 260], np.float32)})["y"].tolist() == [240, np.inf]


def test_integers_are_left_alone(tmp_path: Path) -> None:
    text = "(int32[2] i) => (int32[2] y) { y = Add(i, k) }"
    ids = np.array([2**20 + 1, 7], np.int32)
    np.testing.assert_array_equal(outputs(tmp_path, text, {"i": ids}, k=np.array([1, 1], np.int32))["y"], ids + 1)


def test_a_value_of_unknown_type_is_told() -> None:
    with pytest.raises(ConversionError, match="of what type y is"):
        pass_through_half(graph("(float[2] x) => (y) { y = Unheard(x) }"))


def test_weights_are_not_quantised_and_the_file_is_gone_afterwards(tmp_path: Path) -> None:
    weight = RANDOM.standard_normal((64, 64)).astype(np.float32)
    save_onnx(graph("(float[1, 64] x) => (float[1, 64] y) { y = MatMul(x, w) }", w=weight), tmp_path / "whole.onnx")
    recipe = ComponentRecipe(weights=WeightScheme(bits=2, rounding="least_squares"), floor_db=1)
    feeds = {"x": RANDOM.standard_normal((1, 64)).astype(np.float32)}
    with passed_through_half(tmp_path / "whole.onnx", tmp_path, Component.DIT, recipe, "3.6") as half:
        found = OrtSession(half, threads=1).run(feeds)["y"]
    expected = feeds["x"] @ weight
    # Halves have 11 bits: 66 dB. Two bits would leave about 6 dB.
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
