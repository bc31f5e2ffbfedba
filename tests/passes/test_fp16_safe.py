from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from sa3_convert.errors import ConversionError
from sa3_convert.passes.fp16_safe import make_fp16_safe
from sa3_convert.passes.half import round_to_half
from tests.passes.graphs import Feeds, graph, run_mnn, run_ort, signal_to_noise_db

FREQUENCIES = np.geomspace(0.5, 10000, 128).astype(np.float32)
ROTARY = (10000.0 ** -(np.arange(32) / 32)).astype(np.float32)
TWO_PI = np.float32(2 * np.pi)
TIMES = [0.0, 0.013, 0.5, 0.77, 0.999, 1.0]


def fourier() -> ir.Model:
    """cos and sin of (t·f)·2π: phases up to 62832 rad."""
    return graph(
        """(float[1, 1] t) => (float[1, 256] y) {
        a = Mul(t, f)  p = Mul(a, pi)  c = Cos(p)  s = Sin(p)  y = Concat<axis = 1>(c, s) }""",
        f=FREQUENCIES,
        pi=TWO_PI,
    )


def rotary() -> ir.Model:
    """Phases of 4096 positions, read off a dynamic length, as an outer product."""
    return graph(
        """(float[1, N] x) => (float[N, 32] y) {
        n = Shape(x)  l = Gather(n, one)  k = Squeeze(l)  i = Range(zero, k, step)  p = Cast<to = 1>(i)
        q = Unsqueeze(p, last)  r = MatMul(q, f)  c = Cos(r)  s = Sin(r)  y = Sub(c, s) }""",
        one=np.array([1]),
        zero=np.int64(0),
        step=np.int64(1),
        last=np.array([1]),
        f=ROTARY[None],
    )


def halved(model: ir.Model) -> ir.Model:
    """What `--fp16` does: cut the mantissas of all float constants, limit their magnitudes."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.dtype == np.float32:
            limited = np.clip(array, -65504, 65504)
            cut = (limited.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
            value.const_value = ir.tensor(np.where(np.abs(cut) < 2.0**-24, 0, cut).astype(np.float32))
    return model


@pytest.mark.parametrize("t", TIMES)
def test_fourier_features_are_bitwise_the_same_on_halved_constants(t: float) -> None:
    model, feeds = fourier(), {"t": np.array([[t]], np.float32)}
    (reference,) = run_ort(model, feeds)
    assert make_fp16_safe(model) == 2
    np.testing.assert_array_equal(run_ort(halved(model), feeds)[0], reference)


def test_halved_constants_alone_lose_the_phase() -> None:
    feeds = {"t": np.array([[0.77]], np.float32)}
    assert signal_to_noise_db(run_ort(fourier(), feeds)[0], run_ort(halved(fourier()), feeds)[0]) < 6


def test_rotary_positions_are_bitwise_the_same_on_halved_constants() -> None:
    model, feeds = rotary(), {"x": np.zeros((1, 4096), np.float32)}
    (reference,) = run_ort(model, feeds)
    assert make_fp16_safe(model) == 1
    np.testing.assert_array_equal(run_ort(halved(model), feeds)[0], reference)


@pytest.mark.parametrize("t", TIMES)
def test_mnn_with_fp16_keeps_the_phase(t: float, tmp_path: Path) -> None:
    model, feeds = fourier(), {"t": np.array([[t]], np.float32)}
    (reference,) = run_ort(model, feeds)
    make_fp16_safe(model)
    assert signal_to_noise_db(reference, run_mnn(model, feeds, tmp_path, "--fp16")[0]) > 120


def test_mnn_with_fp16_loses_the_phase_without_the_pass(tmp_path: Path) -> None:
    model, feeds = fourier(), {"t": np.array([[0.77]], np.float32)}
    assert signal_to_noise_db(run_ort(model, feeds)[0], run_mnn(model, feeds, tmp_path, "--fp16")[0]) < 6


def test_mnn_with_fp16_keeps_rotary_positions(tmp_path: Path) -> None:
    model, feeds = rotary(), {"x": np.zeros((1, 4096), np.float32)}
    (reference,) = run_ort(model, feeds)
    make_fp16_safe(model)
    assert signal_to_noise_db(reference, run_mnn(model, feeds, tmp_path, "--fp16")[0]) > 100


PHASES: dict[str, tuple[str, dict[str, NDArray[np.generic] | np.generic], int]] = {
    "a divisor": ("p = Div(t, k)", {"k": np.float32(0.3)}, 1),
    "a summand": ("p = Add(t, k)", {"k": np.float32(np.pi / 2)}, 1),
    "negated and reshaped": ("n = Neg(t)  r = Reshape(n, s)  p = Mul(k, r)", {"k": TWO_PI, "s": np.array([1, 1])}, 1),
    "a constant reshaped first": ("r = Reshape(k, s)  p = Mul(t, r)", {"k": TWO_PI, "s": np.array([1, 1])}, 1),
    "a product of constants": ("r = Mul(k, m)  p = Mul(t, r)", {"k": TWO_PI, "m": np.float32(0.1)}, 2),
    "a Constant node": ("k = Constant<value = float {3.1415927}>()  p = Mul(t, k)", {}, 1),
    "a range of tiny numbers": ("p = Mul(t, k)", {"k": np.float32(1.1e-9)}, 1),
}


@pytest.mark.parametrize(("phase", "constants", "count"), PHASES.values(), ids=PHASES.keys())
def test_constants_are_found_however_the_phase_is_made(
    phase: str, constants: dict[str, NDArray[np.generic] | np.generic], count: int
) -> None:
    model = graph(f"(float[1, 1] t) => (float[1, 1] y) {{ {phase}\n y = Sin(p) }}", **constants)
    feeds = {"t": np.array([[123.4]], np.float32)}
    (reference,) = run_ort(model, feeds)
    assert make_fp16_safe(model) == count
    np.testing.assert_array_equal(run_ort(halved(model), feeds)[0], reference)


def test_a_constant_that_sine_and_cosine_share_is_put_together_once() -> None:
    model = fourier()
    make_fp16_safe(model)
    assert sum(node.op_type == "Clip" for node in model.graph) <= 6


def test_a_second_run_finds_nothing() -> None:
    model = fourier()
    assert [make_fp16_safe(model), make_fp16_safe(model)] == [2, 0]


UNTOUCHED: dict[str, tuple[str, dict[str, NDArray[np.generic] | np.generic]]] = {
    "an exact factor": ("p = Mul(t, k)  y = Sin(p)", {"k": np.float32(384)}),
    "a power of two as divisor": ("y = Div(t, k)", {"k": np.float32(256)}),
    "no sine behind it": ("p = Mul(t, k)  y = Tanh(p)", {"k": TWO_PI}),
    "a phase without inputs": ("p = Mul(m, k)  s = Sin(p)  y = Mul(s, t)", {"k": TWO_PI, "m": np.float32([[2]])}),
    "a linear in front": ("l = MatMul(t, w)  p = Add(l, b)  y = Sin(p)", {"w": FREQUENCIES[:1, None], "b": TWO_PI}),
    "eps of a norm": ("p = Add(t, k)  y = Sqrt(p)", {"k": np.float32(1e-6)}),
    "bounds of Clip": ("y = Clip(t, k, m)", {"k": np.float32(-1e9), "m": np.float32(1e-9)}),
    "minus infinity in a mask": ("y = Add(t, k)", {"k": np.float32(-np.inf)}),
}


@pytest.mark.parametrize(("body", "constants"), UNTOUCHED.values(), ids=UNTOUCHED.keys())
def test_other_constants_stay(body: str, constants: dict[str, NDArray[np.generic] | np.generic]) -> None:
    size = 2 if "MatMul" in body else 1
    constants = {k: np.repeat(v, size, axis=0) if k == "w" else v for k, v in constants.items()}
    model = graph(f"(float[1, {size}] t) => (float[1, 1] y) {{ {body} }}", **constants)
    before = [node.op_type for node in model.graph]
    assert make_fp16_safe(model) == 0
    assert [node.op_type for node in model.graph] == before


OUT_OF_RANGE: dict[str, tuple[str, float, Feeds]] = {
    "a large mask value": ("y = Mul(x, k)", -1e9, {"x": np.array([[0, 1, 0.5]], np.float32)}),
    "a factor below half's normal range": ("y = Mul(x, k)", 1e-6, {"x": np.array([[1, 2, 3]], np.float32)}),
    "a summand that would be zero": ("y = Add(x, k)", 1e-12, {"x": np.zeros((1, 3), np.float32)}),
}


@pytest.mark.parametrize(("body", "number", "feeds"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE.keys())
def test_numbers_outside_half_survive_in_mnn(body: str, number: float, feeds: Feeds, tmp_path: Path) -> None:
    model = graph(f"(float[1, 3] x) => (float[1, 3] y) {{ {body} }}", k=np.float32(number))
    (reference,) = run_ort(model, feeds)
    spoilt = run_mnn(model, feeds, tmp_path, "--fp16")[0]
    assert make_fp16_safe(model) == 1
    np.testing.assert_array_equal(run_ort(model, feeds)[0], reference)
    np.testing.assert_allclose(run_mnn(model, feeds, tmp_path, "--fp16")[0], reference, rtol=1e-6, strict=True)
    assert not np.allclose(spoilt, reference, rtol=1e-3, atol=0)


@pytest.mark.parametrize("divisor", [384.0, 50.0, 0.3])
def test_the_converter_cannot_halve_the_reciprocal_of_a_divisor(divisor: float, tmp_path: Path) -> None:
    model = graph("(float[1, 3] x) => (float[1, 3] y) { y = Div(x, k) }", k=np.float32(divisor))
    feeds = {"x": np.array([[173.3, -2, 0.1]], np.float32)}
    (reference,) = run_ort(model, feeds)
    spoilt = run_mnn(model, feeds, tmp_path, "--fp16")[0]
    assert make_fp16_safe(model) == 1
    assert signal_to_noise_db(reference, spoilt) < 90
    assert signal_to_noise_db(reference, run_mnn(model, feeds, tmp_path, "--fp16")[0]) > 130


def test_a_weight_beyond_half_is_refused() -> None:
    model = graph("(float[1, 1] x) => (float[1, 1] y) { y = MatMul(x, w) }", w=np.float32([[1e5]]))
    with pytest.raises(ConversionError, match=r"'w' .* floats: fp32"):
        make_fp16_safe(model)


def test_integer_inputs_serve_as_well(tmp_path: Path) -> None:
    model = graph(
        "(int32[1, 4] i) => (float[1, 4] y) { f = Cast<to = 1>(i)  p = Mul(f, k)  y = Sin(p) }", k=np.float32(0.7)
    )
    feeds = {"i": np.array([[0, 7, 300, -5]], np.int32)}
    (reference,) = run_ort(model, feeds)
    assert make_fp16_safe(model) == 1
    assert signal_to_noise_db(reference, run_mnn(model, feeds, tmp_path, "--fp16")[0]) > 120


def test_weights_rounded_beforehand_lose_six_decibels_less(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((256, 256)) / 16).astype(np.float32)
    model = graph("(float[4, 256] x) => (float[4, 256] y) { y = MatMul(x, w) }", w=weight)
    feeds = {"x": rng.standard_normal((4, 256)).astype(np.float32)}
    (reference,) = run_ort(model, feeds)
    (truncated,) = run_mnn(model, feeds, tmp_path, "--fp16")
    round_to_half(model)
    (rounded,) = run_mnn(model, feeds, tmp_path, "--fp16")
    gain = signal_to_noise_db(reference, rounded) - signal_to_noise_db(reference, truncated)
    assert 5 < gain < 7
