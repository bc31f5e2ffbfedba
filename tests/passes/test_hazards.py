from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from sa3_convert.errors import ConversionError
from sa3_convert.passes.hazards import HAZARD_KINDS, find_hazards, refuse_hazards
from sa3_convert.passes.operator_kinds import OPERATOR_KINDS
from tests.passes.graphs import convert, graph, mnn_of, run_file, run_file_apart, run_mnn, run_ort, signal_to_noise_db

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 6)).astype(np.float32)
X3 = RNG.standard_normal((1, 3, 8)).astype(np.float32)
CODES = RNG.integers(-127, 128, (16, 6)).astype(np.int8)
INTEGERS = np.array([-3, 2, 5, -7], np.int32)

MASKED = "(float[4, 6] x) => (float[4, 6] y) { c = Greater(x, zero)  y = Where(c, x, other) }"
REDUCED = "(float[4, 6] x) => (float[4, 1] y) { y = OPERATOR<keepdims = 1>(x, axes) }"
RESIZED = '(float[1, 3, 8] x) => (float[1, 3, N] y) { y = Resize<mode = "linear">(x, , s) }'
SLICED = "(float[4, 6] x) => (float[3, 6] y) { y = Slice(x, starts, ends) }"
SHIFTED = "(int32[4] i) => (float[4] y) { a = Cast<to = 7>(i)  b = Add(a, k)  y = Cast<to = 1>(b) }"
WEIGHT_NORM = """(float[1, 6, N] x) => (float[1, 4, N] y) {
    NORM  d = Div(v, n)  w = Mul(d, g)  y = Conv<pads = [1, 1]>(x, w) }"""
ROWS = {"table": X, "i": np.array([-1, 0, 2, -4], np.int32)}
SILU = "(float[4, 6] x) => (float[4, 6] y) { s = Sigmoid(x)  y = Mul(x, s) }"
PART_OF_SHAPE = """(float[4, N] x) => (float[1, M] y) {
    n = Shape<start = 1>(x)  m = Concat<axis = 0>(one, n)  y = Expand(k, m) }"""
V, G = RNG.standard_normal((4, 6, 3)).astype(np.float32), np.ones((4, 1, 1), np.float32)


@dataclass(frozen=True)
class Case:
    id: str
    text: str
    constants: dict[str, Any] = field(default_factory=dict)
    feeds: dict[str, NDArray[Any]] = field(default_factory=dict)
    opset: int = 18
    target: Any = "3.6"
    flags: tuple[str, ...] = ()

    def model(self) -> ir.Model:
        return graph(self.text, self.opset, **self.constants)

    def found(self) -> list[str]:
        return [hazard.id for hazard in find_hazards(self.model(), target_mnn=self.target)]


def reduced(operator: str, axes: list[int]) -> Case:
    text = REDUCED.replace("OPERATOR", operator).replace("float[4, 1] y", f"float[{4 if 0 not in axes else 1}, 1] y")
    return Case("reduce-axes-input", text, {"axes": np.array(axes)}, {"x": np.abs(X) + 0.1})


WRONG = [
    Case("where-broadcast-else", MASKED, {"zero": np.float32(0), "other": X[0]}, {"x": X}),
    Case("where-broadcast-else", MASKED, {"zero": np.float32(0), "other": X[:, :1]}, {"x": X}),
    *(reduced(name, [1]) for name in ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare")),
    Case(
        "round-half-to-even",
        "(float[4] x) => (float[4] y) { y = Round(x) }",
        feeds={"x": np.float32([0.5, 2.5, -0.5, 3.2])},
    ),
    Case(
        "modulo-truncated",
        "(float[4, 6] x) => (float[4, 6] y) { y = Mod<fmod = 1>(x, k) }",
        {"k": np.float32(0.7)},
        {"x": X},
    ),
    Case("int64-constant", SHIFTED, {"k": np.int64(2**32)}, {"i": INTEGERS}),
    Case(
        "dequantize-after-gather",
        "(int32[3] i) => (float[3, 6] y) { g = Gather(t, i)  y = DequantizeLinear(g, s) }",
        {"t": CODES, "s": np.float32(0.01)},
        {"i": np.array([0, 15, 4], np.int32)},
    ),
    Case(
        "dequantize-after-gather",
        "(int32[3] i) => (float[3, 6] y) { d = DequantizeLinear<axis = 0>(t, s)  y = Gather(d, i) }",
        {"t": CODES, "s": RNG.uniform(0.5, 1, 16).astype(np.float32)},
        {"i": np.array([0, 15, 4], np.int32)},
    ),
    Case(
        "gather-negative",
        "(float[4, 6] x) => (float[2, 6] y) { y = Gather(x, i) }",
        {"i": np.array([-1, -4])},
        {"x": X},
        flags=("--optimizeLevel", "2"),
    ),
]

SPORADIC = [
    Case("resize-linear-1d", RESIZED, {"s": np.float32([1, 1, 2])}, {"x": X3}),
    Case("resize-linear-1d", RESIZED.replace('<mode = "linear">', ""), {"s": np.float32([1, 1, 2])}, {"x": X3}),
]

UNSUPPORTED = [
    Case("not-supported", "(float[4, 6] x) => (float[4, 6] y) { n = IsNaN(x)  y = Cast<to = 1>(n) }"),
    Case("not-supported", "(float[4, 6] x) => (float[4, 6] y) { n = IsInf(x)  y = Cast<to = 1>(n) }"),
    Case("not-supported", "(float[4, 6] x) => (float[4, 6] y) { y = Mish(x) }"),
    Case(
        "not-supported",
        "(float[1, 4, 6] x) => (float[1, 4, 6] y) { y = GroupNormalization<num_groups = 2>(x, s, s) }",
        {"s": np.ones(4, np.float32)},
        opset=21,
    ),
    Case(
        "not-supported",
        "(float[4, 6] x) => (float[4, 6] y) { y = RMSNormalization(x, s) }",
        {"s": np.ones(6, np.float32)},
        opset=23,
    ),
    Case("not-supported", "(float[1, 2, 5, 8] x) => (float[1, 2, 5, 8] y) { y = Attention(x, x, x) }", opset=23),
    Case(
        "not-supported",
        "(float[1, 2, 5, 8] x, float[1, 5, 4] c) => (float[1, 2, 5, 8] y) { y = RotaryEmbedding(x, c, c) }",
        opset=23,
    ),
]

ELSEWHERE = [
    Case("integer-unary", "(int32[4] i) => (int32[4] y) { y = Abs(i) }"),
    Case("integer-unary", "(int32[4] i) => (int32[4] y) { y = Neg(i) }"),
    Case("integer-unary", "(float[4] x) => (bool[4] y) { g = Greater(x, k)  y = Not(g) }", {"k": np.float32(0)}),
    Case("integer-division", "(int32[4] i) => (int32[4] y) { y = Div(i, k) }", {"k": np.int32(2)}),
    Case("integer-arithmetic", "(int32[4] i) => (int32[4] y) { y = Add(i, k) }", {"k": np.int32(2)}),
    Case("softmax-low-rows", "(float[4, 6] x) => (float[4, 6] y) { y = Softmax(x) }", target="3.5"),
    Case("softmax-low-rows", "(float[4, 6] x) => (float[4, 6] y) { y = Softmax(x) }", target="3.0"),
    Case("shape-range", PART_OF_SHAPE, {"k": X[:1, :1], "one": np.array([1])}, target="3.1"),
    Case(
        "shape-range",
        PART_OF_SHAPE.replace("start = 1", "start = 0, end = 1"),
        {"k": X[:1, :1], "one": np.array([1])},
        target="3.0",
    ),
    Case("silu-unknown", SILU, target="3.0"),
    Case("silu-unknown", SILU.replace("Mul(x, s)", "Mul(s, x)"), target="3.0"),
    Case(
        "unfused-weight-norm",
        WEIGHT_NORM.replace("NORM", "q = Mul(v, v)  s = ReduceSum(q, axes)  n = Sqrt(s)"),
        {"v": V, "g": G, "axes": np.array([1, 2])},
    ),
    Case(
        "unfused-weight-norm",
        WEIGHT_NORM.replace("NORM", "n = ReduceL2(v, axes)"),
        {"v": V, "g": G, "axes": np.array([1, 2])},
    ),
]

RIGHT = [
    Case("where-broadcast-else", MASKED, {"zero": np.float32(0), "other": np.float32(-7)}, {"x": X}),
    Case("where-broadcast-else", MASKED, {"zero": np.float32(0), "other": X[::-1].copy()}, {"x": X}),
    Case(
        "where-broadcast-else",
        MASKED.replace("c, x, other", "c, other, x"),
        {"zero": np.float32(0), "other": X[0]},
        {"x": X},
    ),
    Case(
        "where-broadcast-else",
        MASKED.replace("Where(c, x, other)", "Where(c, a, b)"),
        {"zero": np.float32(0), "a": X[0], "b": X[:, :1]},
        {"x": X},
    ),
    reduced("ReduceL2", [0, 1]),
    reduced("ReduceSum", [1]),
    reduced("ReduceMax", [1]),
    Case(
        "reduce-axes-input",
        "(float[4, 6] x) => (float[4, 1] y) { y = ReduceL2<axes = [1], keepdims = 1>(x) }",
        feeds={"x": X},
        opset=13,
    ),
    Case(
        "resize-linear-1d",
        '(float[1, 3, 8] x) => (float[1, 3, N] y) { y = Resize<mode = "nearest">(x, , s) }',
        {"s": np.float32([1, 1, 2])},
        {"x": X3},
    ),
    Case(
        "resize-linear-1d",
        '(float[1, 3, 8, 1] x) => (float[1, 3, N, 1] y) { y = Resize<mode = "linear">(x, , s) }',
        {"s": np.float32([1, 1, 2, 1])},
        {"x": X3[..., None].copy()},
    ),
    Case("int64-constant", SLICED, {"starts": np.array([1]), "ends": np.array([2**63 - 1])}, {"x": X}),
    Case("int64-constant", SHIFTED, {"k": np.int64(2**20)}, {"i": INTEGERS}),
    Case(
        "dequantize-after-gather",
        "(float[4, 6] x) => (float[4, 6] y) { d = DequantizeLinear(t, s)  y = Add(d, x) }",
        {"t": CODES[:4].copy(), "s": np.float32(0.01)},
        {"x": X},
    ),
    Case(
        "dequantize-after-gather",
        "(float[4, 6] x) => (float[4, 6] y) { d = DequantizeLinear<axis = 1>(t, s)  y = Add(d, x) }",
        {"t": CODES[:4].copy(), "s": RNG.uniform(0.5, 1, 6).astype(np.float32)},
        {"x": X},
    ),
    Case(
        "gather-negative", "(float[4, 6] x) => (float[2, 6] y) { y = Gather(x, i) }", {"i": np.array([3, 0])}, {"x": X}
    ),
    Case("integer-unary", "(float[4, 6] x) => (float[4, 6] y) { y = Abs(x) }", feeds={"x": X}),
    Case("integer-division", "(float[4, 6] x) => (float[4, 6] y) { y = Div(x, k) }", {"k": np.float32(2)}, {"x": X}),
    Case(
        "integer-division",
        """(float[4, N] x) => (float[1, M] y) {
        s = Shape(x)  n = Gather(s, one)  h = Div(n, two)  m = Concat<axis = 0>(one, h)  y = Expand(k, m) }""",
        {"one": np.array([1]), "two": np.array([2]), "k": np.float32([[3]])},
        {"x": X},
    ),
    Case("softmax-low-rows", "(float[4, 6] x) => (float[4, 6] y) { y = Softmax(x) }", feeds={"x": X}),
    Case(
        "softmax-low-rows",
        "(float[4, 6] x) => (float[4, 6] y) { m = ReduceMax(x, axes)  d = Sub(x, m)  y = Softmax(d) }",
        {"axes": np.array([-1])},
        {"x": X},
        target="3.0",
    ),
    Case("shape-range", PART_OF_SHAPE, {"k": X[:1, :1], "one": np.array([1])}, {"x": X}, target="3.5"),
    Case(
        "shape-range",
        PART_OF_SHAPE.replace("n = Shape<start = 1>(x)", "s = Shape(x)  n = Slice(s, one, two)"),
        {"k": X[:1, :1], "one": np.array([1]), "two": np.array([2])},
        {"x": X},
        target="3.0",
    ),
    Case("silu-unknown", SILU, feeds={"x": X}, target="3.1"),
    Case("silu-unknown", SILU.replace("Mul(x, s)", "Mul(k, s)"), {"k": X}, {"x": X}, target="3.0"),
    Case(
        "unfused-weight-norm",
        "(float[1, 6, N] x) => (float[1, 4, N] y) { n = Neg(v)  y = Conv<pads = [1, 1]>(x, n) }",
        {"v": V},
        {"x": RNG.standard_normal((1, 6, 9)).astype(np.float32)},
    ),
]


def named(case: Case) -> str:
    return case.id


def both(case: Case, folder: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    # MNN goes first: a buffer that it never writes could hold what ONNX Runtime has just left there.
    (target,) = run_mnn(case.model(), case.feeds, folder, *case.flags)
    (reference,) = run_ort(case.model(), case.feeds)
    return reference, target


@pytest.mark.parametrize("case", [*WRONG, *SPORADIC, *UNSUPPORTED, *ELSEWHERE], ids=named)
def test_each_hazard_is_found(case: Case) -> None:
    assert case.id in case.found()


@pytest.mark.parametrize("case", RIGHT, ids=named)
def test_harmless_neighbours_are_not_reported(case: Case) -> None:
    assert case.id not in case.found()


@pytest.mark.parametrize("case", WRONG, ids=named)
def test_mnn_is_wrong_on_what_is_called_wrong(case: Case, tmp_path: Path) -> None:
    reference, target = both(case, tmp_path)
    assert target.shape != reference.shape or not signal_to_noise_db(reference, target) > 20


@pytest.mark.parametrize("case", SPORADIC, ids=named)
def test_mnn_is_wrong_in_some_processes_on_the_same_file(case: Case, tmp_path: Path) -> None:
    # About every third process computes zeros; with other packages installed there are environments where none does.
    (reference,) = run_ort(case.model(), case.feeds)
    path = mnn_of(case.model(), tmp_path)
    if not any(signal_to_noise_db(reference, run_file_apart(path, case.feeds, "y")) < 20 for _ in range(60)):
        pytest.skip("60 processes computed it right: in this environment memory holds nothing that leads MNN astray")


@pytest.mark.parametrize("case", RIGHT, ids=named)
def test_mnn_is_right_on_harmless_neighbours(case: Case, tmp_path: Path) -> None:
    reference, target = both(case, tmp_path)
    assert signal_to_noise_db(reference, target.reshape(reference.shape)) > 100


@pytest.mark.parametrize("case", UNSUPPORTED, ids=named)
def test_mnn_does_not_convert_what_is_called_unsupported(case: Case, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run_mnn(case.model(), {}, tmp_path)


def with_local_function() -> ir.Model:
    text = """<ir_version: 10, opset_import: ["" : 18, "own" : 1]>
    tiny (float[4] x) => (float[4] y) { y = own.twice(x) }
    <domain: "own", opset_import: ["" : 18]> twice (x) => (y) { y = Add(x, x) }"""
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def test_local_functions_are_unsupported(tmp_path: Path) -> None:
    assert [hazard.id for hazard in find_hazards(with_local_function())] == ["local-function"]
    with pytest.raises(FileNotFoundError):
        run_mnn(with_local_function(), {"x": np.zeros(4, np.float32)}, tmp_path)


def test_half_weights_in_external_data_are_wrong_and_found(tmp_path: Path) -> None:
    weight = RNG.standard_normal((64, 64)).astype(np.float16)
    model = graph("(float[2, 64] x) => (float[2, 64] y) { c = Cast<to = 1>(w)  y = MatMul(x, c) }", w=weight)
    assert find_hazards(model) == []
    ir.save(model, tmp_path / "half.onnx", external_data="half.onnx.data")
    assert [hazard.id for hazard in find_hazards(ir.load(tmp_path / "half.onnx"))] == ["half-external-data"]
    convert(tmp_path / "half.onnx", tmp_path / "half.mnn")
    x = RNG.standard_normal((2, 64)).astype(np.float32)
    (result,) = run_file(tmp_path / "half.mnn", {"x": x}, ["y"])
    assert signal_to_noise_db(x @ weight.astype(np.float32), result) < 20


def test_every_kind_has_a_positive_and_a_negative_case() -> None:
    apart = {"half-external-data", "local-function"}
    without_neighbour = apart | {"not-supported", "round-half-to-even", "modulo-truncated", "integer-arithmetic"}
    kinds = {kind.id for kind in HAZARD_KINDS if kind.found is not None} - {kind.id for kind in OPERATOR_KINDS}
    assert {case.id for case in [*WRONG, *SPORADIC, *UNSUPPORTED, *ELSEWHERE]} == kinds - apart
    assert {case.id for case in RIGHT} == kinds - without_neighbour


def test_a_where_of_unknown_shapes_is_reported() -> None:
    model = graph(
        "(bool[N] c, float[N] a, float[M] b, int64[1] s) => (float[K] y) { r = Reshape(a, s)  y = Where(c, r, b) }"
    )
    assert "where-broadcast-else" in [hazard.id for hazard in find_hazards(model)]


def test_a_where_of_equal_dynamic_shapes_is_not() -> None:
    model = graph("(bool[1, N] c, float[4, N] a, float[4, N] b) => (float[4, N] y) { y = Where(c, a, b) }")
    assert "where-broadcast-else" not in [hazard.id for hazard in find_hazards(model)]


def test_hazards_in_branches_are_found() -> None:
    model = graph(
        """(bool c, float[4] x) => (float[4] y) {
        y = If(c) <then_branch = t () => (float[4] a) { a = Round(x) },
                   else_branch = e () => (float[4] b) { b = Neg(x) }> }"""
    )
    assert [hazard.id for hazard in find_hazards(model)] == ["operator-unproven", "round-half-to-even"]


def test_a_plain_graph_is_clean() -> None:
    model = graph("(float[2, 64] x) => (float[2, 64] y) { h = MatMul(x, w)  y = Softmax(h) }", w=np.eye(64, dtype="f"))
    assert find_hazards(model, target_mnn="3.6") == []
    refuse_hazards(model, target_mnn="3.6")


def test_refusal_names_node_kind_and_fix() -> None:
    model = graph("(float[4] x) => (float[4] y) { y = Round(x) }")
    model.graph.node(0).name = "the_rounding"
    with pytest.raises(ConversionError, match=r"round-half-to-even .*Round 'the_rounding'.*Fix: Floor"):
        refuse_hazards(model)


def test_refusal_counts_what_it_does_not_list() -> None:
    model = graph(
        "(float[4] x) => (float[4] y) { a = Round(x)  b = Round(a)  c = Round(b)  d = Round(c)  y = Round(d) }"
    )
    with pytest.raises(ConversionError, match="and 2 more"):
        refuse_hazards(model)


def test_what_is_only_worth_knowing_is_not_refused() -> None:
    model = graph("(float[4, 6] x) => (float[2, 6] y) { y = Gather(x, i) }", i=np.array([-1, -4]))
    refuse_hazards(model)
    with pytest.raises(ConversionError, match="gather-negative"):
        refuse_hazards(model, severities=("info",))


@pytest.mark.parametrize("call", ["Where(x)", "MatMul(x)", "Einsum(x)", "Mod(x)", "PRelu(x)"])
def test_what_is_no_valid_node_is_refused_in_words(call: str) -> None:
    model = graph(f"(float[4, 6] x) => (float[4, 6] y) {{ y = {call} }}", opset=11)
    with pytest.raises(ConversionError):
        refuse_hazards(model)


def test_operators_that_broadcast_as_they_did_once_are_unproven() -> None:
    model = graph("(float[2, 3] x, float[2] z) => (float[2, 3] y) { y = Add<axis = 0, broadcast = 1>(x, z) }", opset=6)
    assert "operator-unproven" in [hazard.id for hazard in find_hazards(model)]
