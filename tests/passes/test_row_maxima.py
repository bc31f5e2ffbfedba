"""The bound on row maxima holds for every input, is reached, and is not claimed where it is not proven."""

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from sa3_convert.passes.softmax import lowest_row_maximum, needs_shift, subtract_row_maximum
from tests.passes.graphs import graph, run_ort

D, N = 16, 5
NORM = """p{n} = Pow({x}, two)  m{n} = ReduceMean<keepdims = 1>(p{n}, last)  e{n} = Add(m{n}, eps)  s{n} = Sqrt(e{n})
    i{n} = Reciprocal(s{n})  n{n} = Mul({x}, i{n})  {n} = Mul(n{n}, gamma_{n})"""
DYNAMIC_TANH = "t{n} = Tanh({x})  g{n} = Mul(t{n}, gamma_{n})  {n} = Add(g{n}, beta_{n})"
ROTATED = """{n}a, {n}b, {n}c = Split<axis = 2>({n}, parts)
    {n}0 = Mul({n}a, cos)  {n}1 = Mul({n}b, sin)  {n}2 = Mul({n}b, cos)  {n}3 = Mul({n}a, sin)
    {n}s = Sub({n}0, {n}1)  {n}u = Add({n}2, {n}3)  {n}r = Concat<axis = -1>({n}s, {n}u, {n}c)"""
LOGITS = "scaled = Mul({q}, scale)  kt = Transpose<perm = [0, 2, 1]>({k})  logits = MatMul(scaled, kt)"
SOFTMAX = "y = Softmax<axis = -1>({logits})"
HEAD = "(float[1, 5, 16] x, float[1, 5, 16] z, float[1, 5] mask) => (float[1, 5, M] y) {{ {body} }}"
PAIRS = [("q", "x"), ("k", "z")]
NORMS = " ".join(NORM.format(n=n, x=x) for n, x in PAIRS)
PLAIN = f"{NORMS} {LOGITS.format(q='q', k='k')} {SOFTMAX.format(logits='logits')}"
ROPE = " ".join(ROTATED.format(n=n) for n, _ in PAIRS)
ROTARY = f"{NORMS} {ROPE} {LOGITS.format(q='qr', k='kr')} {SOFTMAX.format(logits='logits')}"
TANH = " ".join(DYNAMIC_TANH.format(n=n, x=x) for n, x in PAIRS)
SAME = f"{TANH} {ROPE} {LOGITS.format(q='qr', k='kr')} {SOFTMAX.format(logits='logits')}"
CAPPED = f"""kt = Transpose<perm = [0, 2, 1]>(z)  logits = MatMul(x, kt)  d = Div(logits, cap)  t = Tanh(d)
    c = Mul(t, cap)  {SOFTMAX.format(logits="c")}"""
TOKENS = """mq = Unsqueeze(mask, two_)  one_less = Sub(one, mask)  mk = Unsqueeze(one_less, one_)
    both = Mul(mq, mk)  bias = Mul(both, hidden)  masked = Add(c, bias)"""
TEXT = CAPPED.replace("Softmax<axis = -1>(c)", "Softmax<axis = -1>(masked)").replace("y =", f"{TOKENS} y =")
ANGLES = np.outer(np.arange(N), [1.0, 0.3, 0.1, 0.03, 0.01]).astype(np.float32)
RNG = np.random.default_rng(0)


def model(body: str, keys: int = N, **changed: Any) -> ir.Model:
    constants: dict[str, Any] = {
        "two": np.float32(2),
        "one": np.float32(1),
        "last": np.array([-1]),
        "eps": np.float32(1e-6),
        "scale": np.float32(D**-0.5),
        "parts": np.array([5, 5, 6]),
        "cos": np.cos(ANGLES),
        "sin": np.sin(ANGLES),
        "cap": np.float32(50),
        "hidden": np.float32(-1e4),
        "one_": np.array([1]),
        "two_": np.array([2]),
        "pads": np.array([0, 0, 1, 0, 0, 0]),
        "low": np.float32(-1e4),
        **{f"{kind}_{n}": RNG.uniform(-3, 3, D).astype(np.float32) for kind in ("gamma", "beta") for n in "qk"},
    } | changed
    text = HEAD.format(body=body).replace("[1, 5, M]", f"[1, 5, {keys}]")
    used = {name: value for name, value in constants.items() if name in text.replace("(", " ").replace(")", " ")}
    return graph(text, **used)


def softmax(built: ir.Model) -> ir.Node:
    (node,) = (node for node in built.graph if node.op_type == "Softmax")
    return node


def bound(body: str, **changed: Any) -> float:
    return lowest_row_maximum(softmax(inferred(model(body, **changed))))


def inferred(built: ir.Model) -> ir.Model:
    ShapeInferencePass()(built)
    return built


def logits(built: ir.Model, feeds: dict[str, NDArray[Any]]) -> NDArray[Any]:
    value = softmax(built).inputs[0]
    assert value is not None
    built.graph.outputs.append(value)
    return run_ort(built, feeds)[1]


def feeds(seed: int, size: float, tokens: int = 3) -> dict[str, NDArray[Any]]:
    """Keys against the queries: what makes rows low."""
    x = np.random.default_rng(seed).standard_normal((1, N, D)).astype(np.float32) * np.float32(size)
    z = np.broadcast_to(-x[:, :1], x.shape).copy()
    return {"x": x, "z": z, "mask": (np.arange(N) < tokens).astype(np.float32)[None]}


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.integers(0, N))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("body", [PLAIN, ROTARY, SAME, CAPPED, TEXT], ids=["plain", "rotary", "same", "capped", "text"])
def test_no_row_is_lower_than_the_bound(body: str, seed: int, size: float, tokens: int) -> None:
    low = bound(body)
    assert math.isfinite(low)
    found = logits(inferred(model(body)), feeds(seed, size, tokens))
    assert found.max(axis=-1).min() >= low - 1e-3


def test_the_bound_is_reached() -> None:
    gains = np.ones(D, np.float32)
    low = bound(PLAIN, gamma_q=gains, gamma_k=gains)
    found = logits(inferred(model(PLAIN, gamma_q=gains, gamma_k=gains)), feeds(0, 10))
    assert low == pytest.approx(-(D**0.5))
    assert found[0, 0].max() == pytest.approx(low, rel=1e-4)


def test_a_rotation_costs_nothing_and_a_stretched_one_what_it_stretches() -> None:
    gains = {"gamma_q": np.ones(D, np.float32), "gamma_k": np.ones(D, np.float32)}
    assert bound(ROTARY, **gains) == pytest.approx(bound(PLAIN, **gains), rel=1e-5)
    stretched = bound(ROTARY, **gains, cos=2 * np.cos(ANGLES), sin=2 * np.sin(ANGLES))
    assert stretched == pytest.approx(4 * bound(PLAIN, **gains), rel=1e-5)


def test_the_phase_of_a_rotation_may_be_computed() -> None:
    phased = ROTARY.replace("qa, qb", "cos = Cos(angles)  sin = Sin(angles)  qa, qb", 1)
    gains = {"gamma_q": np.ones(D, np.float32), "gamma_k": np.ones(D, np.float32)}
    built = graph(
        HEAD.format(body=phased).replace("M]", "5]"),
        two=np.float32(2),
        last=np.array([-1]),
        eps=np.float32(1e-6),
        scale=np.float32(D**-0.5),
        parts=np.array([5, 5, 6]),
        angles=ANGLES,
        **gains,
    )
    assert lowest_row_maximum(softmax(inferred(built))) == pytest.approx(-(D**0.5))


def with_memory(pad: str) -> str:
    """Hide keys by a mask to which something is padded, behind a mask over keys [1, 1, N]."""
    rows = f"hide = Mul(mask, hidden)  row = Unsqueeze(hide, one_)  {pad}  masked = Add(logits, bias)"
    return PLAIN.replace("y = Softmax<axis = -1>(logits)", f"{rows}  y = Softmax<axis = -1>(masked)")


@pytest.mark.parametrize(
    ("pad", "safe"),
    [
        ("cut = Slice(row, zero_, four_, two_)  bias = Pad(cut, pads)", True),
        ("cut = Slice(row, zero_, four_, two_)  bias = Pad(cut, pads, low)", False),
        ('cut = Slice(row, zero_, four_, two_)  bias = Pad<mode = "edge">(cut, pads)', False),
        ("bias = Identity(row)", False),
    ],
    ids=["zeros", "other numbers", "repeated", "nothing"],
)
def test_a_mask_must_leave_a_key(pad: str, safe: bool) -> None:
    body = with_memory(pad)
    low = bound(body, zero_=np.array([0]), four_=np.array([4]))
    assert math.isfinite(low) is safe


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("Softmax<axis = -1>", "Softmax<axis = 1>"),
        ("Transpose<perm = [0, 2, 1]>", "Transpose<perm = [2, 1, 0]>"),
        ("qs = Sub(q0, q1)", "qs = Sub(q0, q3)"),
        ("q1 = Mul(qb, sin)", "q1 = Mul(qb, cos)"),
        ("q2 = Mul(qb, cos)", "q2 = Mul(qa, cos)"),
        ("Concat<axis = -1>(qs, qu, qc)", "Concat<axis = -1>(qs, qu, x6)"),
        ("pq = Pow(x, two)", "pq = Pow(z, two)"),
        ("nq = Mul(x, iq)", "nq = Mul(x, eq)"),
        ("q = Mul(nq, gamma_q)", "q = Mul(nq, z)"),
    ],
)
def test_what_is_not_proven_is_not_bounded(right: str, wrong: str) -> None:
    assert math.isfinite(bound(ROTARY))
    assert right in ROTARY
    body = ROTARY.replace(right, wrong).replace("pq = ", "xa, xb, x6 = Split<axis = 2>(x, parts)  pq = ", 1)
    assert bound(body) == -math.inf


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mk = Unsqueeze(one_less, one_)", "mk = Unsqueeze(mask, one_)"),
        ("one_less = Sub(one, mask)", "one_less = Sub(two, mask)"),
        ("mq = Unsqueeze(mask, two_)", "mq = Unsqueeze(mask, one_)"),
        ("both = Mul(mq, mk)", "both = Add(mq, mk)"),
    ],
)
def test_a_mask_of_tokens_must_show_each_token_itself(right: str, wrong: str) -> None:
    assert bound(TEXT) == -50
    assert right in TEXT
    assert bound(TEXT.replace(right, wrong)) == -math.inf


def test_gains_that_a_caller_may_override_are_not_known() -> None:
    built = inferred(model(PLAIN))
    built.graph.inputs.append(built.graph.initializers["gamma_q"])
    assert lowest_row_maximum(softmax(built)) == -math.inf


@pytest.mark.parametrize(("gain", "shifted"), [(1.0, 0), (3.9, 0), (4.1, 1)])
def test_only_rows_that_may_be_too_low_are_shifted(gain: float, shifted: int) -> None:
    gains = np.full(D, gain, np.float32)
    built = inferred(model(PLAIN, gamma_q=gains, gamma_k=gains))
    assert needs_shift(softmax(built)) is bool(shifted)
    assert subtract_row_maximum(built) == shifted
    assert not needs_shift(softmax(built))


def test_gains_of_zero_do_not_bound_what_they_meet() -> None:
    body = PLAIN.replace("k = Mul(nk, gamma_k)", "k = Mul(nk, z)")
    assert needs_shift(softmax(inferred(model(body, gamma_q=np.zeros(D, np.float32)))))
