"""Each form that MNN gets wrong, found by its rule and shown wrong, beside one that is neither."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sa3_convert.passes.hazards import find_hazards
from sa3_convert.passes.operator_kinds import OPERATOR_KINDS
from tests.passes.graphs import checked, graph, run_ort
from tests.passes.node_tests import judged

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 5, 7)).astype(np.float32)
M = RNG.standard_normal((3, 4, 5)).astype(np.float32)
C = RNG.standard_normal((1, 6, 20)).astype(np.float32)
C2 = RNG.standard_normal((2, 6, 9, 10)).astype(np.float32)
W1 = RNG.standard_normal((6, 6, 3)).astype(np.float32)
W2 = RNG.standard_normal((6, 6, 4, 3)).astype(np.float32)
INTEGERS = RNG.integers(-9, 10, (2, 3, 5)).astype(np.int32)
V = np.abs(RNG.standard_normal(6)).astype(np.float32)
SAME = "(float[2, 3, 5, 7] x) => (float[2, 3, 5, 7] y) { CALL }"
TRUTH = "(float[2, 3, 5, 7] x) => (bool[2, 3, 5, 7] y) { CALL }"
FREE = "(float[2, 3, 5, 7] x) => (float[A, B, D, E] y) { CALL }"
POOL = "(float[2, 6, 9, 10] x) => (float[2, 6, A, B] y) { CALL }"
LENGTH = "(float[1, 6, 20] x) => (float[1, 6, A] y) { CALL }"
CUBE = "(float[3, 4, 5] x) => (float[A, B, D] y) { CALL }"


@dataclass(frozen=True)
class Case:
    id: str
    text: str
    x: Any
    constants: dict[str, Any] = field(default_factory=dict)
    opset: int = 18

    def model(self) -> ir.Model:
        return graph(self.text, self.opset, **self.constants)

    def found(self) -> list[str]:
        return [hazard.id for hazard in find_hazards(self.model(), target_mnn="3.6")]


def case(name: str, frame: str, call: str, x: Any, opset: int = 18, **constants: Any) -> Case:
    return Case(name, frame.replace("CALL", call), x, constants, opset)


Pair = tuple[Case, Case]


def pair(name: str, frame: str, wrong: str, right: str, x: Any, opset: int = 18, **constants: Any) -> Pair:
    def one(call: str) -> Case:
        used = {key: value for key, value in constants.items() if f", {key}" in call or f"({key}" in call}
        return case(name, frame, call, x, opset, **used)

    return one(wrong), one(right)


PAIRS: list[Pair] = [
    pair("operator-unproven", SAME, "y = Shrink<lambd = 0.3>(x)", "y = Tanh(x)", X),
    pair("less-of-floats", TRUTH, "y = Less(x, k)", "y = Greater(k, x)", X, k=X[::-1].copy()),
    pair(
        "comparison-broadcast",
        TRUTH,
        "s = Slice(x, a, b, c)  y = Greater(s, k)",
        "y = Greater(x, k)",
        X,
        k=X[:, :, :1].copy(),
        a=np.array([0]),
        b=np.array([1]),
        c=np.array([1]),
    ),
    pair(
        "variadic-broadcast",
        SAME,
        "y = Max(x, k, r)",
        "m = Max(x, k)  y = Max(m, r)",
        X,
        k=X[::-1].copy(),
        r=X[0, 0, 0].copy(),
    ),
    *(
        pair(
            "one-element-first",
            "(float[1, 6, 20] x) => (float[1, 6, 18] y) { CALL }",
            f"h = Conv<kernel_shape = [3]>(x, k)  t = Tanh(h)  r = {operator}(s, t)  y = Identity(r)",
            f"h = Conv<kernel_shape = [3]>(x, k)  t = Tanh(h)  z = Squeeze(s)  r = {operator}(z, t)  y = Identity(r)",
            C,
            k=W1,
            s=np.full((1, 1, 1), 0.1, np.float32),
        )
        for operator in ("Add", "Sub", "Mul", "Max")
    ),
    pair("reduce-empty-axes", FREE, "y = ReduceSum<noop_with_empty_axes = 1>(x)", "y = ReduceSum(x)", X),
    pair("reduce-empty-axes", FREE, "y = ReduceMax(x, k)", "y = ReduceMax(x)", X, k=np.zeros(0, np.int64)),
    pair(
        "gemm-transposed-input",
        "(float[7, 7] x) => (float[7, 7] y) { CALL }",
        "y = Gemm<transA = 1>(x, k)",
        "t = Transpose(x)  y = Gemm(t, k)",
        RNG.standard_normal((7, 7)).astype(np.float32),
        k=X[0, 0, :, :5].repeat(2, 0)[:7].repeat(2, 1)[:, :7].copy(),
    ),
    pair(
        "pad-lower",
        POOL,
        'y = Conv<kernel_shape = [4, 3], auto_pad = "SAME_LOWER">(x, k)',
        "y = Conv<kernel_shape = [4, 3], pads = [2, 1, 1, 1]>(x, k)",
        C2,
        k=W2,
    ),
    pair(
        "convolution-1d-output",
        LENGTH,
        "y = Conv<kernel_shape = [3]>(x, k)",
        "h = Conv<kernel_shape = [3]>(x, k)  y = Identity(h)",
        C,
        k=W1,
    ),
    pair(
        "convolution-1d-output",
        LENGTH,
        "h = Conv<kernel_shape = [3]>(x, k)  y = Relu(h)",
        "h = Conv<kernel_shape = [3]>(x, k)  y = Tanh(h)",
        C,
        k=W1,
    ),
    pair(
        "convolution-output-shape",
        POOL,
        "y = ConvTranspose<group = 6, kernel_shape = [4, 3], strides = [2, 2], output_shape = [20, 21]>(x, k)",
        "y = ConvTranspose<group = 6, kernel_shape = [4, 3], strides = [2, 2]>(x, k)",
        C2,
        k=W2[:, :1].copy(),
    ),
    pair(
        "pool-form",
        POOL,
        "y = MaxPool<kernel_shape = [2, 3]>(x)",
        "y = MaxPool<kernel_shape = [2, 3], strides = [1, 1]>(x)",
        C2,
    ),
    pair(
        "pool-form",
        POOL,
        "y = MaxPool<kernel_shape = [2, 3], strides = [3, 1], ceil_mode = 1>(x)",
        "y = MaxPool<kernel_shape = [2, 3], strides = [3, 1]>(x)",
        C2,
    ),
    pair(
        "einsum-form",
        "(float[5, 5] x) => (float[A] y) { CALL }",
        'y = Einsum<equation = "ii->i">(x)',
        'y = Einsum<equation = "ij->i">(x)',
        M[0, :1].repeat(5, 0) + np.eye(5, dtype=np.float32),
    ),
    pair(
        "split-uneven",
        CUBE,
        "y, z = Split<axis = 2, num_outputs = 2>(x)",
        "y, z = Split<axis = 2>(x, k)",
        M,
        k=np.array([3, 2]),
    ),
    pair(
        "scatter-reduction",
        CUBE,
        'y = ScatterND<reduction = "add">(x, k, u)',
        "y = ScatterND(x, k, u)",
        M,
        k=np.array([[0], [2]]),
        u=np.ones((2, 4, 5), np.float32),
    ),
    pair(
        "indices-negative",
        "(float[3, 4, 5] x) => (float[2, 5] y) { CALL }",
        "y = GatherND(x, k)",
        "y = GatherND(x, h)",
        M,
        k=np.array([[0, -1], [-2, 3]]),
        h=np.array([[0, 3], [1, 3]]),
    ),
    pair(
        "softplus-range",
        "(float[201] x) => (float[201] y) { CALL }",
        "y = Softplus(x)",
        "a = Abs(x)  n = Neg(a)  e = Exp(n)  p = Add(e, one)  l = Log(p)  m = Max(x, zero)  y = Add(m, l)",
        np.linspace(-200, 200, 201, dtype=np.float32),
        one=np.float32(1),
        zero=np.float32(0),
    ),
    pair("softmax-flattened", SAME, "y = Softmax(x)", "y = Softmax<axis = 3>(x)", X, 11),
    pair(
        "prelu-later-axis",
        "(float[2, 6, 9, 10] x) => (float[2, 6, 9, 10] y) { CALL }",
        "y = PRelu(x, k)",
        "y = PRelu(x, h)",
        C2,
        k=np.linspace(0, 1, 10, dtype=np.float32),
        h=np.linspace(0, 1, 6, dtype=np.float32).reshape(6, 1, 1),
    ),
    pair(
        "resize-form",
        POOL,
        'y = Resize<mode = "cubic">(x, , k)',
        'y = Resize<mode = "linear">(x, , k)',
        C2,
        k=np.float32([1, 1, 2, 2]),
    ),
    pair("clip-inverted", SAME, "y = Clip(x, k, h)", "y = Clip(x, h, k)", X, k=np.float32(0.5), h=np.float32(-0.5)),
    pair(
        "pad-axes",
        LENGTH,
        "y = Pad(x, k, , a)",
        "y = Pad(x, h)",
        C,
        k=np.array([2, 3]),
        a=np.array([2]),
        h=np.array([0, 0, 2, 0, 0, 3]),
    ),
    pair(
        "norm-without-epsilon",
        "(float[2, 6, 9, 10] x) => (float[2, 6, 9, 10] y) { CALL }",
        "y = InstanceNormalization(x, k, h)",
        "y = InstanceNormalization<epsilon = 0.00001>(x, k, h)",
        C2 * np.float32(1e-4),
        k=V,
        h=V,
    ),
    pair(
        "layer-norm-whole",
        CUBE,
        "y = LayerNormalization<axis = 0>(x, k)",
        "y = LayerNormalization<axis = -1>(x, h)",
        M,
        k=M,
        h=M[0, 0].copy(),
    ),
    pair(
        "matmul-vector",
        "(float[3, 4, 5] x) => (float[3, 4] y) { CALL }",
        "y = MatMul(x, k)",
        "p = MatMul(x, h)  y = Squeeze(p, a)",
        M,
        k=V[:5].copy(),
        h=V[:5, None].copy(),
        a=np.array([-1]),
    ),
    (
        case(
            "arg-extreme-last",
            "(float[2, 3, 5, 7] x) => (int64[2, 5, 7] y) { CALL }",
            "y = ArgMax<axis = 1, keepdims = 0, select_last_index = 1>(x)",
            np.round(X),
        ),
        case(
            "arg-extreme-last",
            "(float[2, 3, 5, 7] x) => (int64[2, 5, 7] y) { CALL }",
            "y = ArgMax<axis = 1, keepdims = 0>(x)",
            np.round(X),
        ),
    ),
    (
        case(
            "arg-extreme-integers",
            "(int32[2, 3, 5] x) => (int64[2, 3] y) { CALL }",
            "y = ArgMin<axis = 2, keepdims = 0>(x)",
            INTEGERS,
        ),
        case(
            "arg-extreme-integers",
            "(int32[2, 3, 5] x) => (int64[2, 3] y) { CALL }",
            "c = Cast<to = 1>(x)  y = ArgMin<axis = 2, keepdims = 0>(c)",
            INTEGERS,
        ),
    ),
    (
        case(
            "integer-product",
            "(int32[2, 3, 5] x) => (int32[2, 3, 3] y) { CALL }",
            "y = MatMul(x, k)",
            INTEGERS,
            k=np.arange(15, dtype=np.int32).reshape(5, 3),
        ),
        case(
            "integer-product",
            "(int32[2, 3, 5] x) => (float[2, 3, 3] y) { CALL }",
            "c = Cast<to = 1>(x)  y = MatMul(c, k)",
            INTEGERS,
            k=np.arange(15, dtype=np.float32).reshape(5, 3),
        ),
    ),
    (
        case(
            "slice-before-begin",
            "(float[1, N, 6] x) => (float[1, A, 6] y) { CALL }",
            "y = Slice(x, s, e, a)",
            np.swapaxes(C, 1, 2)[:, :6].copy(),
            s=np.array([-10]),
            e=np.array([2**31]),
            a=np.array([1]),
        ),
        case(
            "slice-before-begin",
            "(float[1, N, 6] x) => (float[1, A, 6] y) { CALL }",
            "y = Slice(x, s, e, a)",
            np.swapaxes(C, 1, 2)[:, :6].copy(),
            s=np.array([-1]),
            e=np.array([2**31]),
            a=np.array([1]),
        ),
    ),
    (
        case(
            "cast-narrow",
            "(int32[2, 3, 5] x) => (float[2, 3, 5] y) { CALL }",
            "b = Cast<to = 9>(x)  y = Cast<to = 1>(b)",
            INTEGERS,
        ),
        case(
            "cast-narrow",
            "(int32[2, 3, 5] x) => (float[2, 3, 5] y) { CALL }",
            "e = Equal(x, zero)  c = Cast<to = 1>(e)  y = Sub(one, c)",
            INTEGERS,
            zero=np.int32(0),
            one=np.float32(1),
        ),
    ),
    (
        case(
            "type-narrow",
            "(uint8[2, 3, 5] x) => (uint8[2, 3, 5] y) { CALL }",
            "y = Add(x, k)",
            np.abs(INTEGERS).astype(np.uint8),
            k=np.uint8(250),
        ),
        case(
            "type-narrow",
            "(int32[2, 3, 5] x) => (int32[2, 3, 5] y) { CALL }",
            "y = Add(x, k)",
            INTEGERS,
            k=np.int32(250),
        ),
    ),
    (
        case(
            "batch-norm-computed",
            "(float[6] x) => (float[2, 6, 9, 10] y) { CALL }",
            "y = BatchNormalization<epsilon = 0.00001>(k, x, h, h, h)",
            V,
            k=C2,
            h=V,
        ),
        case(
            "batch-norm-computed",
            "(float[2, 6, 9, 10] x) => (float[2, 6, 9, 10] y) { CALL }",
            "y = BatchNormalization<epsilon = 0.00001>(x, h, h, h, h)",
            C2,
            h=V,
        ),
    ),
]
WRONG, RIGHT = [wrong for wrong, _ in PAIRS], [right for _, right in PAIRS]


def named(case: Case) -> str:
    return case.id


@pytest.mark.parametrize("case", WRONG, ids=named)
def test_each_form_is_found(case: Case) -> None:
    assert case.id in case.found()


@pytest.mark.parametrize("case", RIGHT, ids=named)
def test_its_neighbour_is_not(case: Case) -> None:
    assert case.id not in case.found()


def test_what_comes_from_no_channels_may_be_behind_a_constant_of_one_element() -> None:
    call = "h = MatMul(x, k)  y = Mul(s, h)"
    alone = case("", CUBE, call, M, k=M[0].T.copy(), s=np.ones((1, 1, 1), np.float32))
    assert alone.found() == []


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "If", "Loop"])
def test_operators_with_a_state_or_a_branch_are_refused(operator: str) -> None:
    model = graph("(float[4] x) => (float[4] y) { y = Tanh(x) }")
    next(iter(model.graph)).op_type = operator
    assert "operator-unproven" in [hazard.id for hazard in find_hazards(model)]


def test_every_form_has_a_pair() -> None:
    assert {case.id for case in WRONG} == {kind.id for kind in OPERATOR_KINDS}


def _verdicts(cases: list[Case], folder: Path) -> list[tuple[str, str]]:
    folders = []
    for number, one in enumerate(cases):
        folders.append(folder / f"{number}-{one.id}")
        folders[-1].mkdir()
        model = one.model()
        onnx.save(checked(model), folders[-1] / "test.onnx")
        (expected, *_) = run_ort(model, {"x": one.x})
        np.savez(folders[-1] / "feeds.npz", _x=one.x)
        np.savez(folders[-1] / "expected.npz", _y=expected)
        (folders[-1] / "outputs.json").write_text(json.dumps(["y"]))
    return list(judged(folders, lint=False).values())


def test_mnn_is_wrong_on_every_form(tmp_path: Path) -> None:
    verdicts = zip(WRONG, _verdicts(WRONG, tmp_path), strict=True)
    assert [(case.text, why) for case, why in verdicts if why[0] in ("right", "bug")] == []


def test_mnn_is_right_on_every_neighbour(tmp_path: Path) -> None:
    verdicts = zip(RIGHT, _verdicts(RIGHT, tmp_path), strict=True)
    assert [(case.text, why) for case, why in verdicts if why[0] != "right"] == []
