from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from sa3_convert.components import Component
from sa3_convert.mnn.converter import mnn_from_onnx
from sa3_convert.mnn.session import MnnSession
from sa3_convert.passes.pipeline import onnx_for_mnn
from sa3_convert.passes.weights import LEAST_STEP, lacking, lift_small_weights
from sa3_convert.recipe import ComponentRecipe, WeightScheme
from sa3_convert.rounding.compensated import RoundedLinear
from sa3_convert.rounding.grid import Grid, round_least_squares
from sa3_convert.rounding.network import PlannedWeights, quantisable_layers
from tests.passes.graphs import checked, graph, run_ort, signal_to_noise_db

RNG = np.random.default_rng(0)
X = RNG.standard_normal((1, 16, 64)).astype(np.float32)
INT8 = WeightScheme(bits=8)
LINEARS = "(float[1, 16, 64] x) => (float[1, 16, 32] y) { h = MatMul(x, w)  y = Add(h, b) }"
CONVOLUTION = (
    "(float[1, 16, 64] x) => (float[1, 32, 64] y) { h = Conv<kernel_shape = [3], pads = [1, 1]>(x, w, b)  y = Relu(h) }"
)
GEMM = "(float[16, 64] x) => (float[16, 32] y) { y = Gemm<transB = 1>(x, w, b) }"


def weight(*shape: int, size: float = 1.0) -> NDArray[np.float32]:
    return (RNG.standard_normal(shape) * size).astype(np.float32)


def case(name: str, size: float) -> tuple[ir.Model, NDArray[np.float32]]:
    bias = weight(32, size=size)
    if name == "linear":
        return graph(LINEARS, w=weight(64, 32, size=size), b=bias), X
    if name == "gemm":
        return graph(GEMM, w=weight(32, 64, size=size), b=bias), X[0]
    return graph(CONVOLUTION, w=weight(32, 16, 3, size=size), b=bias), X


@pytest.mark.parametrize("name", ["linear", "gemm", "convolution"])
def test_the_function_stays_the_same_bit_for_bit(name: str) -> None:
    model, x = case(name, 1e-6)
    (expected,) = run_ort(model, {"x": x})
    assert lift_small_weights(model, INT8) == 1
    (lifted,) = run_ort(model, {"x": x})
    assert np.array_equal(expected, lifted)
    (layer,) = quantisable_layers(model)
    assert np.abs(layer.read()).max() > 127 * LEAST_STEP
    assert layer.name == ("y" if name == "gemm" else "h")


def test_usual_weights_are_left_alone() -> None:
    model, _ = case("linear", 0.02)
    before = ir.serde.serialize_model(model)
    assert lift_small_weights(model, INT8) == 0
    assert ir.serde.serialize_model(model) == before


def test_a_layer_that_stays_float_is_left_alone() -> None:
    model, _ = case("linear", 1e-6)
    scheme = WeightScheme.model_validate({"bits": 8, "layers": [{"match": "^h$", "bits": None}]})
    assert lift_small_weights(model, scheme) == 0


def test_a_weight_that_two_layers_share_is_lifted_once() -> None:
    model = graph(
        "(float[16, 64] x, float[16, 64] z) => (float[16, 32] y) { p = MatMul(x, w)  q = MatMul(z, w)  y = Sub(p, q) }",
        w=weight(64, 32, size=1e-6),
    )
    feeds = {"x": X[0], "z": X[0, ::-1].copy()}
    (expected,) = run_ort(model, feeds)
    assert lift_small_weights(model, INT8) == 2
    assert np.array_equal(run_ort(model, feeds)[0], expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_channels_are_lifted_from_the_smallest_step_that_is_stored(bits: int, symmetric: bool) -> None:
    grid = Grid(bits, symmetric, None)
    rows = np.linspace(-1, 1, 64, dtype=np.float32)[None].repeat(3, 0)
    levels = grid.top if symmetric else grid.top / 2
    rows *= np.float32([[levels * LEAST_STEP * 1.01], [levels * LEAST_STEP * 0.99], [levels * LEAST_STEP * 0.24]])
    assert lacking(rows, grid).tolist() == [0, 1, 3]


def test_blocks_are_looked_at_each_on_its_own() -> None:
    rows = np.linspace(-1, 1, 64, dtype=np.float32)[None].copy()
    rows[:, :16] *= np.float32(1e-6)
    assert lacking(rows, Grid(8, False, None)).tolist() == [0]
    assert lacking(rows, Grid(8, False, 16)).tolist()[0] > 5


@pytest.mark.parametrize("rows", [np.zeros((1, 64)), np.full((1, 64), 0.5), np.linspace(0.5, 0.50001, 64)[None]])
def test_zeros_and_numbers_that_are_all_alike_are_left_alone(rows: NDArray[Any]) -> None:
    assert lacking(rows.astype(np.float32), Grid(8, False, None)).tolist() == [0]


def test_half_scales_need_more() -> None:
    rows = np.linspace(-1, 1, 64, dtype=np.float32)[None] * np.float32(1e-3)
    assert lacking(rows, Grid(8, False, None)).tolist() == [0]
    assert lacking(rows, Grid(8, False, None, half_scales=True)).tolist() == [3]


def test_the_largest_block_of_a_channel_stays_within_what_half_holds() -> None:
    rows = np.linspace(-1, 1, 64, dtype=np.float32)[None].copy()
    rows[:, :32] *= np.float32(1e-9)
    assert lacking(rows, Grid(8, False, 32, half_scales=True)).tolist() == [15]
    assert lacking(rows, Grid(8, True, 32, half_scales=True)).tolist() == [22]
    assert lacking(rows, Grid(8, False, 32)).tolist() == [20]


SMALL = np.float32([1e-2, 1e-3, 3e-4, 1e-4, 1e-5])


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_that_were_planned_ahead_are_stored_as_planned_however_small(tmp_path: Path, symmetric: bool) -> None:
    rows = np.random.default_rng(7).standard_normal((5, 8, 64)).astype(np.float32)
    rows *= SMALL[:, None, None] / np.abs(rows).max(axis=2, keepdims=True)
    model = graph("(float[1, 16, 64] x) => (float[1, 16, 40] y) { y = MatMul(x, w) }", w=rows.reshape(40, 64).T.copy())
    wanted = run_ort(model, {"x": X})[0]
    onnx.save(checked(model), tmp_path / "reference.onnx")
    scheme = WeightScheme(bits=8, symmetric=symmetric, scales="fp16", rounding="error_compensated")
    recipe, grid = ComponentRecipe(weights=scheme, floor_db=1), Grid(8, symmetric, None, half_scales=True)
    planned = [RoundedLinear("y", round_least_squares(rows.reshape(40, 64), grid), 0.0)]
    onnx_for_mnn(
        tmp_path / "reference.onnx",
        tmp_path / "lifted.onnx",
        Component.DECODER,
        recipe,
        planned=PlannedWeights.write(tmp_path / "planned.safetensors", planned),
    )
    mnn_from_onnx(tmp_path / "lifted.onnx", tmp_path / "model.mnn", recipe)
    with MnnSession(tmp_path / "model.mnn", threads=1) as session:
        found = session.run({"x": X})["y"]
    for size in range(len(SMALL)):
        row = slice(8 * size, 8 * size + 8)
        stored = signal_to_noise_db(wanted[..., row], found[..., row])
        assert stored == pytest.approx(signal_to_noise_db(wanted[..., row], X @ planned[0].weight[row].T), abs=0.3)
        assert stored > 43


MAGNITUDES = 10.0 ** -np.arange(2, 9)


def worst_ratio(folder: Path, scheme: WeightScheme, *, lifted: bool) -> float:
    """Return the worst ratio over linears of falling magnitude, as MNN stores them."""
    calls = "  ".join(f"y{n} = MatMul(x, w{n})" for n in range(len(MAGNITUDES)))
    outputs = ", ".join(f"float[1, 16, 32] y{n}" for n in range(len(MAGNITUDES)))
    weights = {f"w{n}": weight(64, 32, size=size) for n, size in enumerate(MAGNITUDES)}
    model = graph(f"(float[1, 16, 64] x) => ({outputs}) {{ {calls} }}", **weights)
    expected = run_ort(model, {"x": X})
    onnx.save(checked(model), folder / "reference.onnx")
    recipe = ComponentRecipe(weights=scheme, floor_db=1)
    if lifted:
        onnx_for_mnn(folder / "reference.onnx", folder / "lifted.onnx", Component.DECODER, recipe)
    mnn_from_onnx(folder / ("lifted.onnx" if lifted else "reference.onnx"), folder / "model.mnn", recipe)
    with MnnSession(folder / "model.mnn", threads=1) as session:
        found = session.run({"x": X})
    return min(signal_to_noise_db(array, found[f"y{n}"]) for n, array in enumerate(expected))


def test_mnn_keeps_what_was_lifted(tmp_path: Path) -> None:
    assert worst_ratio(tmp_path, INT8, lifted=True) > 40


def test_mnn_loses_what_was_not(tmp_path: Path) -> None:
    assert worst_ratio(tmp_path, INT8, lifted=False) < 0


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize("scales", ["fp32", "fp16"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "least_db"), [(2, 1), (3, 10), (4, 17), (6, 29), (8, 41)])
def test_mnn_keeps_every_width(
    tmp_path: Path, bits: int, least_db: float, symmetric: bool, scales: Any, block_size: int | None
) -> None:
    scheme = WeightScheme(bits=bits, symmetric=symmetric, block_size=block_size, scales=scales)
    assert worst_ratio(tmp_path, scheme, lifted=True) > least_db
