import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.compare import verify_sessions
from sa3_convert.check.inputs import samples_for
from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.ort import OrtSession, integer_products_saturate
from sa3_convert.passes import integers
from sa3_convert.passes.integers import FLOORS_DB, KEPT, check_integers, compute_in_integers
from sa3_convert.passes.pipeline import onnx_in_integers
from tests.passes.graphs import Feeds, graph, run_ort, signal_to_noise_db

TWO = "(float[B, T, 48] x) => (float[B, T, 8] y, float[B, T, 20] z) { y = MatMul(x, w) z = MatMul(x, v) }"


def run_integers(model: ir.Model, feeds: Feeds) -> list[NDArray[Any]]:
    """Run as `OrtSession` does: where products of bytes would saturate, an optimisation takes exact ones."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if integer_products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def two() -> ir.Model:
    return graph(TWO, w=normal(48, 8), v=normal(48, 20))


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def mixing(width: int) -> NDArray[np.float64]:
    """H for a width that 16 divides and 64 does not: +1 or -1 by how many bits two numbers share."""
    signs = [[(-1) ** (i & j).bit_count() for i in range(16)] for j in range(16)]
    return np.kron(np.eye(width // 16), np.array(signs) / 4)


def constants(model: ir.Model) -> dict[str, NDArray[Any]]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def test_products_of_one_activation_share_its_codes() -> None:
    model, x = two(), normal(2, 5, 48)
    exact = run_ort(model, {"x": x})
    assert compute_in_integers(model) == 2
    assert kinds(model).count("QuantizeLinear") == kinds(model).count("ReduceMax") == 1
    assert kinds(model).count("MatMulIntegerToFloat") == 2
    # That which mixes the channels.
    assert kinds(model).count("MatMul") == 1
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    for one, other in zip(exact, run_integers(model, {"x": x}), strict=True):
        assert 36 < signal_to_noise_db(one, other) < 60


def test_weights_are_codes_of_eight_bits_with_a_scale_per_output() -> None:
    model, w = two(), normal(48, 8)
    compute_in_integers(model)
    found = constants(model)
    assert {"w", "v"}.isdisjoint(found)
    assert (found["w.codes"].dtype, found["w.scales"].shape) == (np.int8, (8,))
    np.testing.assert_array_equal(np.abs(found["w.codes"]).max(axis=0), 127)
    step, mixed = found["w.scales"], mixing(48) @ w
    assert (np.abs(found["w.codes"] * step - mixed) <= step * 0.5001).all()


def test_the_result_is_that_of_the_formula() -> None:
    model, x = two(), normal(1, 7, 48)
    compute_in_integers(model)
    found = constants(model)
    mixed = x @ mixing(48)
    scale = np.abs(mixed).max(axis=-1, keepdims=True) / 127
    codes = np.rint(mixed / scale).astype(np.int64)
    expected = codes @ found["w.codes"].astype(np.int64) * found["w.scales"] * scale
    # Hardly a code lies so near to a half that another order of sums moves it.
    assert signal_to_noise_db(expected, run_integers(model, {"x": x})[0]) > 90


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_any_batch_and_length(batch: int, tokens: int) -> None:
    model, x = two(), normal(batch, tokens, 48)
    exact = run_ort(model, {"x": x})
    compute_in_integers(model)
    for one, other in zip(exact, run_integers(model, {"x": x}), strict=True):
        assert signal_to_noise_db(one, other) > 34


def test_a_token_of_zeros_gives_zeros_and_leaves_the_others_as_they_are() -> None:
    model, x = two(), normal(1, 4, 48)
    compute_in_integers(model)
    alone = run_integers(model, {"x": x})
    x[0, 2] = 0
    together = run_integers(model, {"x": x})
    for one, other in zip(alone, together, strict=True):
        assert not other[0, 2].any()
        np.testing.assert_array_equal(np.delete(other, 2, axis=1), np.delete(one, 2, axis=1))


@pytest.mark.parametrize(("width", "least"), [(64, 8.0), (48, 6.0), (20, 3.0), (7, 0.0), (257, 0.0)])
def test_an_outlier_channel_costs_less_where_channels_are_mixed(
    width: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error_of() -> float:
        model = graph(text, w=w)
        (exact,) = run_ort(model, {"x": x})
        compute_in_integers(model)
        return signal_to_noise_db(exact, run_integers(model, {"x": x})[0])

    text = f"(float[T, {width}] x) => (float[T, 32] y) {{ y = MatMul(x, w) }}"
    w, x = normal(width, 32), normal(9, width)
    x[:, 3], w[3] = x[:, 3] * 100, w[3] / 100
    mixed = error_of()
    monkeypatch.setattr(integers, "_BLOCKS", ())
    gained = mixed - error_of()
    assert gained > least if least else gained == 0


NORM = """(float[B, T, 16] x) => (float[B, T, 8] y) {
    square = Pow(x, two) mean = ReduceMean <keepdims = 1> (square, last) sum = Add(mean, eps) root = Sqrt(sum)
    factor = Reciprocal(root) even = Mul(x, factor) normed = Mul(even, gamma) y = MatMul(normed, w)
}"""


def norm(text: str = NORM) -> ir.Model:
    numbers = {"two": np.float32(2), "eps": np.float32(1e-3), "last": np.array([-1])}
    return graph(text, w=normal(16, 8), gamma=normal(16), **numbers)


def test_an_rms_norm_is_one_operator() -> None:
    model, x = norm(), normal(2, 3, 16)
    x[0, 1] = 0
    (exact,) = run_ort(model, {"x": x})
    compute_in_integers(model)
    assert {"Pow", "Sqrt", "Reciprocal"}.isdisjoint(kinds(model))
    assert kinds(model)[0] == "SimplifiedLayerNormalization"
    assert signal_to_noise_db(exact, run_integers(model, {"x": x})[0]) > 34


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("Mul(even, gamma)", "Mul(even, x)"),
        ("Pow(x, two)", "Pow(x, eps)"),
        ("Mul(x, factor)", "Mul(square, factor)"),
        ("normed = Mul(even, gamma)", "more = Sin(even) twice = Mul(even, gamma) normed = Add(more, twice)"),
        ("MatMul(normed, w)", "Gemm(even, w)"),
    ],
)
def test_what_is_no_rms_norm_stays(part: str, other: str) -> None:
    model = norm(NORM.replace(part, other))
    before = kinds(model)[:7]
    compute_in_integers(model)
    assert kinds(model)[:7] == before


def test_mixing_twice_is_nothing() -> None:
    w = normal(128, 24)
    np.testing.assert_allclose(integers._mixed(integers._mixed(w)), w, atol=1e-6)


SCALED = (
    "(float[B, T, 48] x, float[8] s) => (float[B, T, 8] y) { one = Constant<value_float=1.0>() f = Add(s, one) %s }"
)


def scaled_by(product: str) -> ir.Model:
    return ShapeInferencePass()(graph(SCALED % product, w=normal(48, 8))).model


@pytest.mark.parametrize("product", ["p = MatMul(x, w) y = Mul(p, f)", "p = MatMul(x, w) y = Mul(f, p)"])
def test_a_computed_factor_of_each_output_goes_into_the_scales(product: str) -> None:
    model, feeds = scaled_by(product), {"x": normal(2, 5, 48), "s": normal(8, seed=1)}
    (exact,) = run_ort(model, feeds)
    assert compute_in_integers(model) == 1
    (scaled,) = (node for node in model.graph if node.op_type == "MatMulIntegerToFloat")
    assert scaled.inputs[3] is not None
    assert scaled.inputs[3].producer().op_type == "Mul"  # type: ignore[union-attr]
    # By its tokens' scales alone.
    assert [user.op_type for user, _ in scaled.outputs[0].uses()] == ["Mul"]
    assert model.graph.outputs[0].name == "y"
    assert signal_to_noise_db(exact, run_integers(model, feeds)[0]) > 36


@pytest.mark.parametrize(
    "product",
    [
        "p = MatMul(x, w) m = Mul(p, f) y = Add(m, p)",
        "p = MatMul(x, w) y = Mul(p, p)",
        "p = MatMul(x, w) y = Add(p, f)",
        "p = MatMul(x, w) axes = Constant<value_ints=[0, 1]>() g = Unsqueeze(f, axes) y = Mul(p, g)",
    ],
)
def test_what_is_no_factor_of_outputs_alone_stays_behind_the_product(product: str) -> None:
    model, feeds = scaled_by(product), {"x": normal(2, 5, 48), "s": normal(8, seed=1)}
    (exact,) = run_ort(model, feeds)
    compute_in_integers(model)
    (scaled,) = (node for node in model.graph if node.op_type == "MatMulIntegerToFloat")
    assert scaled.inputs[3] is not None
    assert scaled.inputs[3].producer() is None
    assert signal_to_noise_db(exact, run_integers(model, feeds)[0]) > 30


def test_what_a_component_keeps_stays_float() -> None:
    text = "(float[T, 16] x) => (float[T, 8] out) { inner = MatMul(x, w) out = MatMul(inner, v) }"
    model = graph(text, w=normal(16, 8), v=normal(8, 8))
    model.graph[0].outputs[0].name = "transformer.project_in"
    assert compute_in_integers(model, Component.DIT) == 1
    assert "w" in constants(model)


def test_a_loud_token_costs_the_others_nothing() -> None:
    model, x = two(), normal(1, 4, 48)
    compute_in_integers(model)
    alone = run_integers(model, {"x": x})
    x[0, 3, 7] = 1e4
    for one, other in zip(alone, run_integers(model, {"x": x}), strict=True):
        np.testing.assert_array_equal(other[:, :3], one[:, :3])


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_activations_of_any_size(size: float) -> None:
    model, x = two(), normal(1, 4, 48) * np.float32(size)
    exact = run_ort(model, {"x": x})
    compute_in_integers(model)
    for one, other in zip(exact, run_integers(model, {"x": x}), strict=True):
        assert signal_to_noise_db(one / size, other / size) > 34


def test_channels_of_zeros_and_of_tiny_weights() -> None:
    w = normal(48, 8)
    w[:, 1], w[:, 2], w[:, 3] = 0, w[:, 2] * np.float32(1e-30), np.float32(1e-45)
    model, x = graph(TWO, w=w, v=normal(48, 20)), normal(1, 4, 48)
    exact = run_ort(model, {"x": x})[0]
    compute_in_integers(model)
    found = run_integers(model, {"x": x})[0]
    assert not found[..., 1].any()
    assert signal_to_noise_db(exact[..., 2] * 1e30, found[..., 2] * 1e30) > 30
    assert np.isfinite(found).all()


def test_a_weight_of_two_products_is_stored_once_and_one_that_others_read_stays() -> None:
    text = """(float[T, 12] x, float[T, 12] y) => (float[T, 6] out, float[12, 6] sine) {
        first = MatMul(x, w) second = MatMul(y, w) out = Add(first, second) sine = Sin(w)
    }"""
    model = graph(text, w=normal(12, 6))
    assert compute_in_integers(model) == 2
    assert [name for name in constants(model) if name.startswith("w")] == ["w", "w.codes", "w.scales"]
    assert kinds(model).count("QuantizeLinear") == 2


@pytest.mark.parametrize(
    "text",
    [
        "(float[T, 12] x) => (float[T, 6] out) { out = Gemm(x, w) }",
        "(float[T, 12] x, float[12, 6] w) => (float[T, 6] out) { out = MatMul(x, w) }",
        "(float[5, 12] x) => (float[5, 5] out) { y = Transpose <perm = [1, 0]> (x) out = MatMul(x, y) }",
        "(float[T, 1] x) => (float[T, 6] out) { out = MatMul(x, row) }",
        "(float[3, T, 12] x) => (float[3, T, 6] out) { out = MatMul(x, several) }",
        "(float[6, T] x) => (float[12, T] out) { out = MatMul(w, x) }",
    ],
)
def test_what_is_no_product_with_a_constant_matrix_stays(text: str) -> None:
    given = {"w": normal(12, 6), "row": normal(1, 6), "several": normal(3, 12, 6)}
    inputs = text.split("=>")[0]
    model = graph(text, **{name: array for name, array in given.items() if name in text and f" {name})" not in inputs})
    before = kinds(model), model.opset_imports.copy()
    assert compute_in_integers(model) == 0
    assert (kinds(model), model.opset_imports) == before


def test_a_saved_model_is_held_to_its_reference() -> None:
    model = two()
    compute_in_integers(model)
    assert check_integers(model, two()) == 2


def change(name: str, by: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[ir.Model], None]:
    def replace(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(by(value.const_value.numpy().copy()), name=name)

    return replace


def nudge(array: NDArray[Any]) -> NDArray[Any]:
    array.reshape(-1)[0] += 1
    return array


def own_codes(model: ir.Model) -> None:
    """Give the second product an activation quantised by another scale."""
    product = next(node for node in model.graph if node.outputs[0].name == "z.product")
    codes = product.inputs[0]
    assert codes is not None
    quantise = codes.producer()
    assert quantise is not None
    again = ir.node("QuantizeLinear", quantise.inputs, quantise.attributes, outputs=[ir.val("other")])
    model.graph.insert_before(product, again)
    product.replace_input_with(0, again.outputs[0])


def without_token_scale(model: ir.Model) -> None:
    last = next(node for node in model.graph if node.outputs[0].name == "y")
    last.replace_input_with(1, model.graph.initializers["integers.one"])


def whole_scale(model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "ReduceMax").attributes["keepdims"] = ir.AttrInt64(
        "keepdims", 0
    )


def float_product(model: ir.Model) -> None:
    weight = ir.val("w", const_value=ir.tensor(normal(48, 8), name="w"))
    model.graph.register_initializer(weight)
    last = next(node for node in model.graph if node.outputs[0].name == "y.product")
    again = ir.node("MatMul", [model.graph.inputs[0], weight], outputs=[ir.val("float")])
    model.graph.insert_before(last, again)
    last.outputs[0].replace_all_uses_with(again.outputs[0])
    model.graph.remove(last, safe=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (change("w.codes", nudge), "w.codes"),
        (change("v.scales", nudge), "v.scales"),
        (change("w.codes", lambda codes: codes.view(np.uint8)), "w.codes"),
        (change("v.scales", lambda scales: scales[:1]), "v.scales"),
        (change("integers.zero", lambda zero: zero - 1), "integers.zero"),
        (change("integers.step", lambda step: step * 2), "integers.step"),
        (own_codes, "not what its reference makes"),
        (without_token_scale, "not what its reference makes"),
        (whole_scale, "not what its reference makes"),
        (float_product, "1 integer products; its reference has 2"),
        (lambda model: model.opset_imports.update({"": 22}), "operator sets"),
        (lambda model: model.graph.outputs.pop(), "outputs"),
        (lambda model: model.graph.initializers.pop("w.scales"), "w.scales"),
    ],
)
def test_a_model_that_lies_is_caught(fault: Callable[[ir.Model], object], message: str) -> None:
    model = two()
    compute_in_integers(model)
    fault(model)
    with pytest.raises(ConversionError, match=message):
        check_integers(model, two())


def test_seven_bits_are_not_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    with monkeypatch.context() as patch:
        patch.setattr(integers, "_TOP", 63)
        compute_in_integers(model)
        saved = ir.from_proto(ir.to_proto(model))
    with pytest.raises(ConversionError, match="does not hold"):
        check_integers(saved, two())


@pytest.fixture(scope="module")
def quantised(toy_int8: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[Component, tuple[Path, Path, int]]:
    folder = tmp_path_factory.mktemp("quantised")
    made = {}
    for component in Component:
        reference = toy_int8.file(component, "onnx")
        (folder / component.value).mkdir()
        target = folder / component.value / reference.name
        made[component] = (reference, target, onnx_in_integers(reference, target, component))
    return made


@pytest.mark.parametrize("component", list(Component))
def test_every_linear_of_many_rows_is_an_integer_product(
    component: Component, quantised: dict[Component, tuple[Path, Path, int]]
) -> None:
    reference, target, count = quantised[component]
    before, after = (onnx.load(path, load_external_data=False).graph for path in (reference, target))
    stored = {tensor.name for tensor in before.initializer}
    linears = [node.output[0] for node in before.node if node.op_type == "MatMul" and node.input[1] in stored]
    expected = sum(re.search(KEPT.get(component, r"(?!)"), name) is None for name in linears)
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in after.node) == expected == count
    assert (count == 0) == (component is Component.NUMBER_CONDITIONER)


@pytest.mark.parametrize("component", list(Component))
def test_whatever_is_not_a_linear_keeps_its_values(
    component: Component, quantised: dict[Component, tuple[Path, Path, int]]
) -> None:
    reference, target, _ = quantised[component]
    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        for path in (reference, target)
    )
    graph = onnx.load(reference, load_external_data=False).graph
    linears = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    assert not {name for name in before.keys() - linears - after.keys() if before[name].size > 1}
    for name in (before.keys() & after.keys()) - linears:
        np.testing.assert_array_equal(after[name], before[name])
    kept = KEPT.get(component, r"(?!)")
    assert [name for name in linears & after.keys() if not re.search(kept, name.removesuffix(".weight"))] == []


@pytest.mark.parametrize("component", list(Component))
def test_the_integer_form_is_above_its_floor_and_is_not_the_reference(
    component: Component, quantised: dict[Component, tuple[Path, Path, int]], toy_int8: Bundle
) -> None:
    reference, target, count = quantised[component]
    openers = partial(OrtSession, reference, threads=2), partial(OrtSession, target, threads=2, optimise=True)
    samples = samples_for(component, toy_int8.layout, quick=True)
    result = verify_sessions(*openers, component, toy_int8.layout, samples)
    result.check_floor(FLOORS_DB[component])
    assert (result.worst.signal_to_noise_db < 60) == (count > 0)


def test_ports_are_those_of_the_reference_and_nothing_else_is_left(
    quantised: dict[Component, tuple[Path, Path, int]],
) -> None:
    for reference, target, _ in quantised.values():
        before, after = OrtSession(reference, threads=1), OrtSession(target, threads=1, optimise=True)
        assert (before.inputs, before.outputs) == (after.inputs, after.outputs)
        assert {path.name for path in target.parent.iterdir()} == {target.name, target.name + ".data"}
