"""What depends on range and precision: arithmetic, and stored weights in each memory mode."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sa3_convert.components import Component
from sa3_convert.lab.doctor.probe import EVERY_SETTING, EXACT_DB, PRECISIONS, GraphProbe

_RANDOM = np.random.default_rng(1)
_AXES: Final = (16, 32, 33, 64, 128, 256, 512)
_MAXIMA: Final = (0, -30, -60, -70, -80, -90)
_ATTENDING: Final = (Component.TEXT_ENCODER, Component.DIT, Component.DECODER, Component.ENCODER)
_AUTOENCODER: Final = (Component.DECODER, Component.ENCODER)


def _normal(*shape: int) -> NDArray[np.float32]:
    return _RANDOM.standard_normal(shape).astype(np.float32)


def _logits(width: int) -> NDArray[np.float32]:
    """Return one row for each of the maxima, [6, width]."""
    rows = -np.abs(10 * _RANDOM.standard_normal((len(_MAXIMA), width)))
    rows -= rows.max(axis=1, keepdims=True)
    shifted: NDArray[np.float32] = (rows + np.array(_MAXIMA)[:, None]).astype(np.float32)
    return shifted


_LOGITS: Final[dict[str, NDArray[Any]]] = {f"x{width}": _logits(width) for width in _AXES}


_LOW_ROWS_IN_HALF_DB: Final = 30.0
"""Halves around 90 lie 1/16 apart: logits are off by 0.018 on average, and exponentials by as much, which is 35 dB."""


def _each(given: str, made: str, each: str, widths: Sequence[int] = _AXES) -> str:
    """Return a graph that does the same for several widths, which stand for #."""
    inputs, outputs, body = (
        mark.join(text.replace("#", str(width)) for width in widths)
        for text, mark in ((given, ", "), (made, ", "), (each, "  "))
    )
    return f"({inputs}) => ({outputs}) {{ {body} }}"


def _softmax(each: str) -> str:
    return _each("float[6, #] x#", "float[6, #] y#", each)


_NORMED: Final = (64, 96, 768, 1024)
"""Widths of heads, text encoder and DiT; kernels of GPUs differ by width."""
_RMS_CONSTANTS: Final[dict[str, Any]] = {"two": np.float32(2), "last": np.array([-1]), "eps": np.float32(1e-6)}


def _rms(x: str, y: str, gain: str, own: str) -> str:
    """Return an RMS norm as exporters spell it; `own` makes the names between unique."""
    return (
        f"q{own} = Pow({x}, two)  m{own} = ReduceMean<keepdims = 1>(q{own}, last)  n{own} = Add(m{own}, eps)  "
        f"s{own} = Sqrt(n{own})  i{own} = Reciprocal(s{own})  a{own} = Mul({x}, i{own})  {y} = Mul(a{own}, {gain})"
    )


def _gated(scale: float) -> GraphProbe:
    """Return a gated MLP before a norm; its product reaches about 10⁶ unless it is scaled."""
    gate, up, down = 40 * _normal(32, 64) / 6, 40 * _normal(32, 64) / 6, _normal(64, 32) / 8
    scaled = scale != 1
    return GraphProbe(
        id="gated-product-scaled" if scaled else "gated-product",
        asks=f"gelu(gate)·up before a norm, {'scaled into' if scaled else 'beyond'} the range of half",
        text="""(float[1, 8, 32] x) => (float[1, 8, 32] y) {
            g = MatMul(x, wg)  u = MatMul(x, wu)
            c = Mul(g, g)  d = Mul(c, g)  e = Mul(d, k)  f = Add(g, e)  h = Mul(f, r)  t = Tanh(h)  o = Add(t, one)
            a = Mul(g, half)  b = Mul(a, o)  p = Mul(b, u)  z = MatMul(p, wd)
            q = Mul(z, z)  m = ReduceMean<keepdims = 1>(q, axes)  n = Add(m, eps)  s = Sqrt(n)  i = Reciprocal(s)
            y = Mul(z, i) }""",
        constants={
            "wg": gate.astype(np.float32),
            "wu": (up * scale).astype(np.float32),
            "wd": down.astype(np.float32),
            "k": np.float32(0.044715),
            "r": np.float32(0.7978845608),
            "one": np.float32(1),
            "half": np.float32(0.5),
            "axes": np.array([-1]),
            "eps": np.float32(1e-6 * scale**2),
        },
        feeds=({"x": 10 * _normal(1, 8, 32)},),
        hazard=None if scaled else "half-overflow",
        needed_by=(Component.TEXT_ENCODER,) if scaled else (),
        settings=PRECISIONS,
    )


_FOURIER = """(float[1, 1] t) => (float[1, 64] y) {
    a = Mul(t, f)  p = Mul(a, tau)  c = Cos(p)  s = Sin(p)  y = Concat<axis = -1>(c, s) }"""
_FREQUENCIES: Final = np.exp(np.linspace(np.log(0.5), np.log(10000), 32)).astype(np.float32)
_TIMES: Final = tuple({"t": np.array([[t]], np.float32)} for t in (0.13, 0.517, 0.991))
_ROTARY = """(float[1, 2, N, 16] x) => (float[1, 2, N, 16] y) {
    s = Shape<start = 2, end = 3>(x)  l = Squeeze(s)  g = Cast<to = 1>(l)  n = Range(zero, g, step)
    c1 = Unsqueeze(n, one)  p = Mul(c1, f)  c = Cos(p)  q = Sin(p)
    x1, x2 = Split<axis = -1, num_outputs = 2>(x)
    a = Mul(x1, c)  b = Mul(x2, q)  d = Sub(a, b)  e = Mul(x2, c)  h = Mul(x1, q)  k = Add(e, h)
    y = Concat<axis = -1>(d, k) }"""
_ROTARY_CONSTANTS: Final[dict[str, Any]] = {
    "zero": np.float32(0),
    "step": np.float32(1),
    "one": np.array([1]),
    "f": (10000.0 ** (-np.arange(8) / 8)).astype(np.float32),
}
_LONG: Final = ({"x": _normal(1, 2, 1400, 16)},)

ARITHMETIC: tuple[GraphProbe, ...] = (
    GraphProbe(
        id="softmax",
        asks="Softmax over 16 to 512 with row maxima from 0 to −90",
        text=_softmax("y# = Softmax<axis = -1>(x#)"),
        feeds=(_LOGITS,),
        hazard="softmax-low-rows",
        settings=PRECISIONS,
        half_db=_LOW_ROWS_IN_HALF_DB,
    ),
    GraphProbe(
        id="softmax-shifted",
        asks="the same with the row maximum subtracted first",
        text=_softmax("m# = ReduceMax<keepdims = 1>(x#, axes)  d# = Sub(x#, m#)  y# = Softmax<axis = -1>(d#)"),
        constants={"axes": np.array([-1])},
        feeds=(_LOGITS,),
        needed_by=_ATTENDING,
        settings=PRECISIONS,
        half_db=_LOW_ROWS_IN_HALF_DB,
    ),
    GraphProbe(
        id="softmax-low-precision",
        asks="Softmax between two products, where precision low keeps half buffers",
        text="""(float[2, 40, 16] x) => (float[2, 40, 16] y) {
            t = MatMul(x, w)  s = Softmax<axis = -1>(t)  y = MatMul(s, v) }""",
        constants={"w": _normal(16, 64), "v": _normal(64, 16)},
        feeds=({"x": _normal(2, 40, 16)},),
        hazard="softmax-low-precision",
        settings=PRECISIONS,
    ),
    GraphProbe(
        id="attention",
        asks="attention with capped logits and an additive mask of −10⁴",
        text="""(float[1, 4, 24, 16] q, float[1, 4, 24, 16] k, float[1, 4, 24, 16] v, float[1, 24] m)
            => (float[1, 4, 24, 16] y) {
            t = Transpose<perm = [0, 1, 3, 2]>(k)  l = MatMul(q, t)  a = Div(l, cap)  b = Tanh(a)  c = Mul(b, cap)
            n = Sub(one, m)  o = Unsqueeze(n, axes)  p = Mul(o, low)  d = Add(c, p)
            h = ReduceMax<keepdims = 1>(d, last)  e = Sub(d, h)  s = Softmax<axis = -1>(e)  y = MatMul(s, v) }""",
        constants={
            "cap": np.float32(50),
            "one": np.float32(1),
            "low": np.float32(-1e4),
            "axes": np.array([1, 2]),
            "last": np.array([-1]),
        },
        feeds=({name: _normal(1, 4, 24, 16) for name in "qkv"} | {"m": (np.arange(24)[None] < 9).astype(np.float32)},),
        needed_by=_ATTENDING,
        settings=PRECISIONS,
    ),
    GraphProbe(
        id="rms-norm",
        asks="RMS norm over 64, 96, 768 and 1024, spelled out",
        text=_each("float[1, 12, #] x#", "float[1, 12, #] y#", _rms("x#", "y#", "g#", "#"), _NORMED),
        constants=_RMS_CONSTANTS | {f"g{width}": _normal(width) for width in _NORMED},
        feeds=({f"x{width}": _normal(1, 12, width) for width in _NORMED},),
        needed_by=(Component.TEXT_ENCODER, Component.DIT),
        settings=PRECISIONS,
    ),
    _gated(1.0),
    _gated(2.0**-8),
    GraphProbe(
        id="fourier-features",
        asks="sines and cosines of phases up to 6·10⁴",
        text=_FOURIER,
        constants={"f": _FREQUENCIES, "tau": np.float32(2 * np.pi)},
        feeds=_TIMES,
        needed_by=(Component.DIT, Component.NUMBER_CONDITIONER),
        settings=PRECISIONS,
        least_db=60,
        ahead=True,
    ),
    GraphProbe(
        id="fourier-features-half",
        asks="the same converted with --fp16",
        text=_FOURIER,
        constants={"f": _FREQUENCIES, "tau": np.float32(2 * np.pi)},
        feeds=_TIMES,
        hazard="half-constants",
        flags=("--fp16",),
        least_db=60,
    ),
    GraphProbe(
        id="fourier-features-parts",
        asks="the same, frequencies as sums of parts that half holds",
        text=_FOURIER,
        constants={"f": _FREQUENCIES, "tau": np.float32(2 * np.pi)},
        feeds=_TIMES,
        flags=("--fp16",),
        rewrite="fp16-safe",
        needed_by=(Component.DIT, Component.NUMBER_CONDITIONER),
        least_db=60,
    ),
    GraphProbe(
        id="rotary",
        asks="rotary positions up to 1400, counted at run time",
        text=_ROTARY,
        constants=_ROTARY_CONSTANTS,
        feeds=_LONG,
        needed_by=(Component.DIT,),
        settings=PRECISIONS,
    ),
    GraphProbe(
        id="rotary-half",
        asks="the same converted with --fp16",
        text=_ROTARY,
        constants=_ROTARY_CONSTANTS,
        feeds=_LONG,
        hazard="half-constants",
        flags=("--fp16",),
        least_db=60,
    ),
    GraphProbe(
        id="dynamic-tanh",
        asks="γ·tanh(α·x) + β and a gate of SiLU",
        text="""(float[1, 20, 32] x) => (float[1, 20, 16] y) {
            a = Mul(x, alpha)  t = Tanh(a)  g = Mul(t, gamma)  b = Add(g, beta)
            v, w = Split<axis = -1, num_outputs = 2>(b)  s = Sigmoid(w)  u = Mul(w, s)  y = Mul(v, u) }""",
        constants={"alpha": np.float32(0.7), "gamma": _normal(32), "beta": _normal(32)},
        feeds=({"x": _normal(1, 20, 32)},),
        needed_by=_AUTOENCODER,
        settings=PRECISIONS,
    ),
    GraphProbe(
        id="dynamic-length",
        asks="lengths 8, 33, 8 and 96 in one session: Conv, Pad, Transpose, Slice",
        text="""(float[1, 8, N] x) => (float[1, 8, M] y) {
            c = Conv<pads = [1, 1]>(x, w)  p = Pad(c, pads)  t = Transpose<perm = [0, 2, 1]>(p)  m = MatMul(t, v)
            a = Add(t, m)  s = Slice(a, from, to, axis)  y = Transpose<perm = [0, 2, 1]>(s) }""",
        constants={
            "w": _normal(8, 8, 3) / 5,
            "v": _normal(8, 8),
            "pads": np.array([0, 0, 2, 0, 0, 1]),
            "from": np.array([1]),
            "to": np.array([-1]),
            "axis": np.array([1]),
        },
        feeds=tuple({"x": _normal(1, 8, length)} for length in (8, 33, 8, 96)),
        needed_by=(Component.DIT, *_AUTOENCODER),
        settings=PRECISIONS,
    ),
)

_WEIGHTS_RANDOM = np.random.default_rng(2)
_ALL: Final = tuple(Component)
_LINEAR = "(float[1, N, 64] x) => (float[1, N, 96] y) { m = MatMul(x, w)  y = Add(m, b) }"
_POINTWISE = "(float[1, 64, N] x) => (float[1, 96, N] y) { c = Conv(x, w, b)  y = Identity(c) }"
_CONV = "(float[1, 32, N] x) => (float[1, 48, N] y) { c = Conv<pads = [1, 1]>(x, w, b)  y = Identity(c) }"
_LOOKUP = "(int32[1, 12] i) => (float[1, 12, 64] y) { g = Gather(w, i)  y = Mul(g, k) }"


def _normal_weights(*shape: int) -> NDArray[np.float32]:
    return _WEIGHTS_RANDOM.standard_normal(shape).astype(np.float32)


_LINEAR_CONSTANTS: Final[dict[str, Any]] = {"w": _normal_weights(64, 96) / 8, "b": _normal_weights(96)}
_LINEAR_FEEDS: Final = tuple({"x": _normal_weights(1, rows, 64)} for rows in (12, 40))
"""More than 16 rows take another way on CUDA at memory low."""
_CONV_CONSTANTS: Final[dict[str, Any]] = {"w": _normal_weights(48, 32, 3) / 10, "b": _normal_weights(48)}
_CONV_FEEDS: Final = ({"x": _normal_weights(1, 32, 40)}, {"x": _normal_weights(1, 32, 17)})
_POINTWISE_CONSTANTS: Final = _LINEAR_CONSTANTS | {"w": np.ascontiguousarray(_LINEAR_CONSTANTS["w"].T)[:, :, None]}
_POINTWISE_FEEDS: Final = tuple({"x": np.ascontiguousarray(f["x"].transpose(0, 2, 1))} for f in _LINEAR_FEEDS)
_IDS: Final = ({"i": _WEIGHTS_RANDOM.integers(0, 200, (1, 12)).astype(np.int32)},)
_TABLE: Final[dict[str, Any]] = {"w": _normal_weights(200, 64), "k": np.float32(8)}

_BITS: Final = {8: 36.0, 4: 12.0}
"""Least ratio that the arithmetic of memory low leaves as well (8-bit activations)."""
_BLOCK_DB: Final = 30.0
"""The same after four layers, one after the other."""


def _stored(kind: str, how: str, least_db: float, *flags: str) -> GraphProbe:
    """Return the probe of a kind of layer whose weights are stored in a way."""
    what, text, constants, feeds, needed_by = _LAYERS[kind]
    return GraphProbe(
        id=f"{kind}-{how}" if how else kind,
        asks=f"{what} with {_WAYS[how]} weights",
        text=text,
        constants=constants,
        feeds=feeds,
        needed_by=needed_by,
        flags=flags,
        settings=EVERY_SETTING,
        least_db=least_db,
    )


def _quantised(kind: str, bits: int, *flags: str) -> GraphProbe:
    asked = ("--weightQuantBits", str(bits), "--weightQuantAsymmetric=1", *flags)
    return _stored(kind, f"int{bits}" + ("-blocks" if flags else ""), _BITS[bits], *asked)


def _dit_block(width: int = 1024, heads: int = 16) -> GraphProbe:
    """Return self-attention and gated MLP as the DiT has them, at its true width."""

    def weight(rows: int, columns: int) -> NDArray[np.float32]:
        return _WEIGHTS_RANDOM.standard_normal((rows, columns), dtype=np.float32) / np.float32(rows**0.5)

    def headed(part: str) -> str:
        return f"{part}r = Reshape({part}, cut)  {part}h = Transpose<perm = [0, 2, 1, 3]>({part}r)"

    return GraphProbe(
        id="dit-block",
        asks="a block of the DiT at its true width, 8-bit weights, two lengths",
        text=f"""(float[1, N, {width}] x, float[1, N] mask) => (float[1, N, {width}] y) {{
            {_rms("x", "xn", "gx", "1")}  p = MatMul(xn, wp)  q, k, v = Split<axis = -1, num_outputs = 3>(p)
            {headed("q")}  {headed("k")}  {headed("v")}  {_rms("qh", "qg", "gq", "2")}  {_rms("kh", "kg", "gk", "3")}
            qs = Mul(qg, scale)  kt = Transpose<perm = [0, 1, 3, 2]>(kg)  l = MatMul(qs, kt)
            u = Sub(one, mask)  ul = Mul(u, masked)  um = Unsqueeze(ul, middle)  lm = Add(l, um)
            w = Softmax<axis = -1>(lm)  o = MatMul(w, vh)  ot = Transpose<perm = [0, 2, 1, 3]>(o)
            om = Reshape(ot, join)  d = MatMul(om, wo)  h = Add(x, d)
            {_rms("h", "hn", "gx", "4")}  e = MatMul(hn, we)  f, g = Split<axis = -1, num_outputs = 2>(e)
            t = Sigmoid(g)  z = Mul(g, t)  j = Mul(f, z)  r = MatMul(j, wr)  y = Add(h, r) }}""",
        constants=_RMS_CONSTANTS
        | {name: _normal_weights(size) for name, size in (("gx", width), ("gq", 64), ("gk", 64))}
        | {"wp": weight(width, 3 * width), "wo": weight(width, width)}
        | {"we": weight(width, 2 * width), "wr": weight(width, width)}
        | {"cut": np.array([0, 0, heads, width // heads]), "join": np.array([0, 0, width]), "middle": np.array([1, 2])}
        | {"scale": np.float32((width // heads) ** -0.5), "one": np.float32(1), "masked": np.float32(-1e4)},
        feeds=tuple(
            {"x": _normal_weights(1, n, width), "mask": (np.arange(n)[None] < n - 5).astype(np.float32)}
            for n in (40, 17)
        ),
        needed_by=(Component.DIT,),
        flags=("--weightQuantBits", "8", "--weightQuantAsymmetric=1"),
        settings=EVERY_SETTING,
        least_db=_BLOCK_DB,
        external_data=True,
    )


_WAYS: Final = {
    "": "float",
    "half": "float16",
    "int8": "8-bit",
    "int8-blocks": "8-bit, in blocks,",
    "int4": "4-bit",
}
_LAYERS: Final = {
    "linear": ("a linear of 12 and of 40 rows", _LINEAR, _LINEAR_CONSTANTS, _LINEAR_FEEDS, _ALL),
    "conv": ("a convolution of 3, two lengths,", _CONV, _CONV_CONSTANTS, _CONV_FEEDS, _AUTOENCODER),
    "pointwise": (
        "a convolution of 1, two lengths,",
        _POINTWISE,
        _POINTWISE_CONSTANTS,
        _POINTWISE_FEEDS,
        (Component.DIT, *_AUTOENCODER),
    ),
}
_HALF_STORED_DB: Final = 55.0

WEIGHTS: tuple[GraphProbe, ...] = (
    *(_stored(kind, "", EXACT_DB) for kind in _LAYERS),
    *(_stored(kind, "half", _HALF_STORED_DB, "--fp16") for kind in ("linear", "pointwise")),
    *(_quantised(kind, bits) for kind in _LAYERS for bits in (8, 4)),
    _quantised("linear", 8, "--weightQuantBlock", "16"),
    _dit_block(),
    GraphProbe(
        id="table-int8",
        asks="rows of an int8 table: Gather, Cast, Mul",
        text=_LOOKUP,
        constants=_TABLE,
        feeds=_IDS,
        needed_by=(Component.TEXT_ENCODER,),
        rewrite="int8-table",
        settings=PRECISIONS,
        least_db=40,
    ),
    GraphProbe(
        id="table-int4",
        asks="rows of a table with two numbers to a byte: Gather, Floor, Sub",
        text=_LOOKUP,
        constants=_TABLE,
        feeds=_IDS,
        needed_by=(Component.TEXT_ENCODER,),
        rewrite="int4-table",
        settings=PRECISIONS,
        least_db=15,
    ),
)
