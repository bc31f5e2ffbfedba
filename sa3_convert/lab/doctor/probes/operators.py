"""Single operators, spelled as they come from exporters: most are rows of the hazard table."""

from typing import Any, Final

import numpy as np

from sa3_convert.components import Component
from sa3_convert.lab.doctor.probe import PRECISIONS, GraphProbe

_RANDOM = np.random.default_rng(0)
_X: Final = _RANDOM.standard_normal((4, 6)).astype(np.float32)
_X3: Final = _RANDOM.standard_normal((1, 3, 8)).astype(np.float32)
_CODES: Final = _RANDOM.integers(-127, 128, (16, 6)).astype(np.int8)
_ROWS: Final = np.array([0, 15, 4], np.int32)
_INTEGERS: Final = np.array([-3, 2, 5, -7, 0, 70000], np.int32)
_NAN: Final = np.array([0.5, np.nan, -2.0, np.nan, 3.0, 0.0], np.float32)

_MASKED = "(float[4, 6] x) => (float[4, 6] y) { c = Greater(x, zero)  y = Where(c, x, other) }"


def _reduction(operator: str) -> GraphProbe:
    return GraphProbe(
        id=f"{operator.lower()}-axes",
        asks=f"{operator} over the axes that an input names",
        text=f"(float[4, 6] x) => (float[4, 1] y) {{ y = {operator}<keepdims = 1>(x, axes) }}",
        constants={"axes": np.array([1])},
        feeds=({"x": np.abs(_X) + np.float32(0.1)},),
        hazard="reduce-axes-input",
    )


def _unsupported(operator: str, text: str, opset: int = 18, **constants: Any) -> GraphProbe:
    return GraphProbe(
        id=f"{operator.lower()}-operator",
        asks=f"the operator {operator}",
        text=text,
        constants=constants,
        feeds=({"x": _X},),
        hazard="not-supported",
        opset=opset,
    )


def _integers(operator: str, call: str, hazard: str, out: str = "int32", **constants: Any) -> GraphProbe:
    return GraphProbe(
        id=f"int32-{operator.lower()}",
        asks=f"{operator} of int32",
        text=f"(int32[6] i) => ({out}[6] y) {{ {call} }}",
        constants=constants,
        feeds=({"i": _INTEGERS},),
        hazard=hazard,
    )


def _hides_nan(operator: str, call: str, **constants: Any) -> GraphProbe:
    return GraphProbe(
        id=f"nan-{operator.lower()}",
        asks=f"{operator} of NaN is NaN",
        text=f"(float[6] x) => (float[6] y) {{ y = {call} }}",
        constants=constants,
        feeds=({"x": _NAN},),
        hazard="nan-hidden",
    )


OPERATORS: tuple[GraphProbe, ...] = (
    GraphProbe(
        id="where-broadcast-row",
        asks="Where whose second branch is one row",
        text=_MASKED,
        constants={"zero": np.float32(0), "other": _X[0]},
        feeds=({"x": _X},),
        hazard="where-broadcast-else",
    ),
    GraphProbe(
        id="where-broadcast-column",
        asks="Where whose second branch is one column",
        text=_MASKED,
        constants={"zero": np.float32(0), "other": _X[:, :1].copy()},
        feeds=({"x": _X},),
        hazard="where-broadcast-else",
    ),
    *(_reduction(name) for name in ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare")),
    GraphProbe(
        id="resize-linear",
        asks="linear Resize of one dimension, in many processes",
        text='(float[1, 3, 8] x) => (float[1, 3, N] y) { y = Resize<mode = "linear">(x, , s) }',
        constants={"s": np.array([1, 1, 2], np.float32)},
        feeds=({"x": _X3},),
        hazard="resize-linear-1d",
        processes=40,
    ),
    GraphProbe(
        id="round-half",
        asks="Round of halves",
        text="(float[4] x) => (float[4] y) { y = Round(x) }",
        feeds=({"x": np.array([0.5, 2.5, -0.5, 3.2], np.float32)},),
        hazard="round-half-to-even",
    ),
    GraphProbe(
        id="modulo-truncated",
        asks="Mod that takes the dividend's sign",
        text="(float[4, 6] x) => (float[4, 6] y) { y = Mod<fmod = 1>(x, k) }",
        constants={"k": np.float32(0.7)},
        feeds=({"x": _X},),
        hazard="modulo-truncated",
    ),
    GraphProbe(
        id="int64-constant",
        asks="an int64 constant of 2³²",
        text="(int32[6] i) => (float[6] y) { a = Cast<to = 7>(i)  b = Add(a, k)  y = Cast<to = 1>(b) }",
        constants={"k": np.int64(2**32)},
        feeds=({"i": _INTEGERS},),
        hazard="int64-constant",
    ),
    GraphProbe(
        id="dequantize-after-gather",
        asks="DequantizeLinear of rows gathered from an int8 table",
        text="(int32[3] i) => (float[3, 6] y) { g = Gather(t, i)  y = DequantizeLinear(g, s) }",
        constants={"t": _CODES, "s": np.float32(0.01)},
        feeds=({"i": _ROWS},),
        hazard="dequantize-after-gather",
    ),
    GraphProbe(
        id="dequantize-rows",
        asks="DequantizeLinear of a table with one scale per row",
        text="(int32[3] i) => (float[3, 6] y) { d = DequantizeLinear<axis = 0>(t, s)  y = Gather(d, i) }",
        constants={"t": _CODES, "s": _RANDOM.uniform(0.5, 1, 16).astype(np.float32)},
        feeds=({"i": _ROWS},),
        hazard="dequantize-after-gather",
    ),
    GraphProbe(
        id="half-external-data",
        asks="float16 weights in external data",
        text="(float[4, 64] x) => (float[4, 64] y) { c = Cast<to = 1>(w)  y = MatMul(x, c) }",
        constants={"w": _RANDOM.standard_normal((64, 64)).astype(np.float16)},
        feeds=({"x": _RANDOM.standard_normal((4, 64)).astype(np.float32)},),
        hazard="half-external-data",
        external_data=True,
        least_db=60,
    ),
    _unsupported("IsNaN", "(float[4, 6] x) => (float[4, 6] y) { n = IsNaN(x)  y = Cast<to = 1>(n) }"),
    _unsupported("IsInf", "(float[4, 6] x) => (float[4, 6] y) { n = IsInf(x)  y = Cast<to = 1>(n) }"),
    _unsupported("Mish", "(float[4, 6] x) => (float[4, 6] y) { y = Mish(x) }"),
    _unsupported(
        "GroupNormalization",
        "(float[4, 6] x) => (float[4, 6] y) { y = GroupNormalization<num_groups = 2>(x, s, s) }",
        21,
        s=np.ones(6, np.float32),
    ),
    _unsupported(
        "RMSNormalization",
        "(float[4, 6] x) => (float[4, 6] y) { y = RMSNormalization(x, s) }",
        23,
        s=np.ones(6, np.float32),
    ),
    _unsupported(
        "Attention",
        "(float[4, 6] x) => (float[1, 1, 4, 6] y) { q = Reshape(x, s)  y = Attention(q, q, q) }",
        23,
        s=np.array([1, 1, 4, 6]),
    ),
    _unsupported(
        "RotaryEmbedding",
        """(float[4, 6] x) => (float[1, 1, 4, 6] y) { q = Reshape(x, s)  y = RotaryEmbedding(q, c, c) }""",
        23,
        s=np.array([1, 1, 4, 6]),
        c=np.full((1, 4, 3), 0.6, np.float32),
    ),
    GraphProbe(
        id="local-function",
        asks="a function of the model's own",
        text="""(float[4, 6] x) => (float[4, 6] y) { y = own.twice(x) }
            <domain: "own", opset_import: ["" : 18]> twice (a) => (b) { b = Add(a, a) }""",
        feeds=({"x": _X},),
        hazard="local-function",
    ),
    _integers("Abs", "y = Abs(i)", "integer-unary"),
    _integers("Neg", "y = Neg(i)", "integer-unary"),
    _integers("Sign", "y = Sign(i)", "integer-unary"),
    _integers("Not", "g = Greater(i, k)  n = Not(g)  y = Cast<to = 6>(n)", "integer-unary", k=np.int32(0)),
    _integers("Div", "y = Div(i, k)", "integer-division", k=np.int32(2)),
    _integers("Mod", "y = Mod(i, k)", "integer-division", k=np.int32(4)),
    _integers("Add", "y = Add(i, k)", "integer-arithmetic", k=np.int32(3)),
    _integers("Mul", "y = Mul(i, k)", "integer-arithmetic", k=np.int32(-3)),
    _integers("Max", "y = Max(i, k)", "integer-arithmetic", k=np.int32(1)),
    _integers("Less", "l = Less(i, k)  y = Cast<to = 6>(l)", "integer-arithmetic", k=np.int32(1)),
    _integers(
        "And",
        "l = Less(i, k)  g = Greater(i, n)  a = And(l, g)  y = Cast<to = 6>(a)",
        "integer-arithmetic",
        k=np.int32(4),
        n=np.int32(-4),
    ),
    GraphProbe(
        id="gather-negative",
        asks="Gather with indices from the end, optimised as converted here",
        text="(float[4, 6] x) => (float[2, 6] y) { y = Gather(x, i) }",
        constants={"i": np.array([-1, -4])},
        feeds=({"x": _X},),
        hazard="gather-negative",
    ),
    GraphProbe(
        id="gather-negative-level-2",
        asks="the same with --optimizeLevel 2",
        text="(float[4, 6] x) => (float[2, 6] y) { y = Gather(x, i) }",
        constants={"i": np.array([-1, -4])},
        feeds=({"x": _X},),
        hazard="gather-negative",
        flags=("--optimizeLevel", "2"),
    ),
    _hides_nan("Tanh", "Tanh(x)"),
    _hides_nan("Sigmoid", "Sigmoid(x)"),
    _hides_nan("Exp", "Exp(x)"),
    _hides_nan("Relu", "Relu(x)"),
    _hides_nan("Clip", "Clip(x, low, high)", low=np.float32(-1), high=np.float32(1)),
    _hides_nan("Max", "Max(x, low)", low=np.float32(-1)),
    _hides_nan("Mul", "Mul(x, two)", two=np.float32(2)),
    GraphProbe(
        id="int32-inputs",
        asks="int32 ids and mask as inputs: Gather from a table, Cast to float",
        text="""(int32[6] i, int32[6] m) => (float[6, 6] y) {
            g = Gather(t, i)  f = Cast<to = 1>(m)  c = Unsqueeze(f, one)  y = Mul(g, c) }""",
        constants={"t": _RANDOM.standard_normal((16, 6)).astype(np.float32), "one": np.array([1])},
        feeds=({"i": np.array([3, 0, 15, 7, 1, 1], np.int32), "m": np.array([1, 1, 1, 1, 0, 0], np.int32)},),
        needed_by=(Component.TEXT_ENCODER,),
        settings=PRECISIONS,
    ),
    GraphProbe(
        id="broadcast-loop",
        asks="a sum broadcast over several dimensions",
        text="(float[2, 1, 5, 1, 3] a, float[1, 4, 1, 6, 3] b) => (float[2, 4, 5, 6, 3] y) { y = Add(a, b) }",
        feeds=(
            {
                "a": _RANDOM.standard_normal((2, 1, 5, 1, 3)).astype(np.float32),
                "b": _RANDOM.standard_normal((1, 4, 1, 6, 3)).astype(np.float32),
            },
        ),
        hazard="loops",
        settings=PRECISIONS,
    ),
    GraphProbe(
        id="matmul-loop",
        asks="MatMul of batches of different sizes",
        text="(float[2, 1, 5, 8] a, float[3, 8, 4] b) => (float[2, 3, 5, 4] y) { y = MatMul(a, b) }",
        feeds=(
            {
                "a": _RANDOM.standard_normal((2, 1, 5, 8)).astype(np.float32),
                "b": _RANDOM.standard_normal((3, 8, 4)).astype(np.float32),
            },
        ),
        hazard="loops",
        settings=PRECISIONS,
    ),
)
