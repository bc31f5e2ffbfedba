from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from sa3_convert.errors import ConversionError
from sa3_convert.passes.pipeline import load_onnx, save_onnx
from sa3_convert.passes.weights import round_weights
from sa3_convert.recipe import LayerRule, ScaleType, WeightScheme
from sa3_convert.rounding.grid import Grid
from tests.passes.graphs import graph, run_mnn, run_ort, signal_to_noise_db
from tests.rounding.converter import round_as_converter

RNG = np.random.default_rng(0)
FIRST, SECOND = (RNG.standard_normal((64, 64)).astype(np.float32) / 8 for _ in range(2))
X = RNG.standard_normal((4, 64)).astype(np.float32)


def two_linears() -> ir.Model:
    return graph(
        "(float[4, 64] x) => (float[4, 64] y) { first = MatMul(x, v)  h = Tanh(first)  y = MatMul(h, w) }",
        v=FIRST,
        w=SECOND,
    )


def stored(model: ir.Model, name: str) -> NDArray[Any]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scales", ["fp32", "fp16"])
@pytest.mark.parametrize(("bits", "block_size"), [(8, None), (4, None), (4, 32)])
def test_the_converter_stores_exactly_what_was_planned(
    bits: int, block_size: int | None, scales: ScaleType, symmetric: bool, tmp_path: Path
) -> None:
    model = two_linears()
    scheme = WeightScheme(bits=bits, symmetric=symmetric, block_size=block_size, scales=scales)
    assert round_weights(model, scheme) == 2
    flags = ["--weightQuantBits", str(bits), f"--weightQuantAsymmetric={int(not symmetric)}"]
    flags += ["--weightQuantBlock", str(block_size)] if block_size else []
    flags += ["--weightQuantScaleBit", "16"] if scales == "fp16" else []
    (target,) = run_mnn(model, {"x": X}, tmp_path, *flags)
    assert signal_to_noise_db(run_ort(model, {"x": X})[0], target) > 100


def test_four_bits_come_out_closer_than_by_the_converter_alone(tmp_path: Path) -> None:
    model = graph("(float[64, 64] x) => (float[64, 64] y) { y = MatMul(x, v) }", v=FIRST)
    feeds = {"x": np.eye(64, dtype=np.float32)}
    (plain,) = run_mnn(model, feeds, tmp_path, "--weightQuantBits", "4")
    round_weights(model, WeightScheme(bits=4))
    (planned,) = run_mnn(model, feeds, tmp_path, "--weightQuantBits", "4")
    assert signal_to_noise_db(FIRST, planned) > signal_to_noise_db(FIRST, plain) + 0.3


def test_planned_weights_are_a_fixed_point_of_the_converters_rounding() -> None:
    model = two_linears()
    round_weights(model, WeightScheme(bits=4))
    weight = np.ascontiguousarray(stored(model, "v").T)
    again = round_as_converter(weight, Grid(4, symmetric=False, block_size=None))
    np.testing.assert_allclose(again, weight, rtol=0, atol=1e-6, strict=True)


def test_layers_that_a_rule_keeps_in_floating_point_stay() -> None:
    model = two_linears()
    assert round_weights(model, WeightScheme(bits=4, layers=(LayerRule(match="first", bits=None),))) == 1
    np.testing.assert_array_equal(stored(model, "v"), FIRST)
    assert (stored(model, "w") != SECOND).any()


def test_a_shared_weight_is_rounded_once() -> None:
    model = graph("(float[4, 64] x) => (float[4, 64] y) { h = MatMul(x, v)  y = MatMul(h, v) }", v=FIRST)
    assert round_weights(model, WeightScheme(bits=8)) == 1


def test_a_shared_weight_with_two_grids_is_refused() -> None:
    model = graph("(float[4, 64] x) => (float[4, 64] y) { h = MatMul(x, v)  y = MatMul(h, v) }", v=FIRST)
    scheme = WeightScheme(bits=8, layers=(LayerRule(match="^h$", bits=4),))
    with pytest.raises(ConversionError, match=r"'y' shares the weight 'v'.*4 bits"):
        round_weights(model, scheme)


def test_weights_are_rounded_only_when_they_are_read() -> None:
    model = two_linears()
    round_weights(model, WeightScheme(bits=8))
    assert isinstance(model.graph.initializers["v"].const_value, ir.LazyTensor)


def test_weights_of_a_file_are_let_go_when_they_are_written(tmp_path: Path) -> None:
    """Else a model of 6 GB is resident when its last weight is rounded."""
    save_onnx(two_linears(), tmp_path / "source.onnx")
    model = load_onnx(tmp_path / "source.onnx")
    originals = [model.graph.initializers[name].const_value for name in ("v", "w")]
    round_weights(model, WeightScheme(bits=8))
    save_onnx(model, tmp_path / "rounded.onnx")
    for original in originals:
        assert isinstance(original, ir.ExternalTensor)
        assert original.raw is None
    rounded = load_onnx(tmp_path / "rounded.onnx")
    assert 30 < signal_to_noise_db(FIRST, stored(rounded, "v")) < 60
