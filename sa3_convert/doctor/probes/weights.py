"""Stored weights: integers in each memory mode, half floats, and tables that are gathered from."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sa3_convert.components import Component
from sa3_convert.doctor.probe import EVERY_SETTING, PRECISIONS, GraphProbe
from sa3_convert.passes.quantise_embedding import quantise_embedding

_RANDOM = np.random.default_rng(2)
_ALL: Final = tuple(Component)
_LINEAR = "(float[1, 12, 64] x) => (float[1, 12, 96] y) { m = MatMul(x, w)  y = Add(m, b) }"
_CONV = "(float[1, 32, N] x) => (float[1, 48, N] y) { c = Conv<pads = [1, 1]>(x, w, b)  y = Identity(c) }"
_LOOKUP = "(int32[1, 12] i) => (float[1, 12, 64] y) { g = Gather(w, i)  y = Mul(g, k) }"


def _normal(*shape: int) -> NDArray[np.float32]:
    return _RANDOM.standard_normal(shape).astype(np.float32)


_LINEAR_CONSTANTS: Final[dict[str, Any]] = {"w": _normal(64, 96) / 8, "b": _normal(96)}
_LINEAR_FEEDS: Final = ({"x": _normal(1, 12, 64)},)
_CONV_CONSTANTS: Final[dict[str, Any]] = {"w": _normal(48, 32, 3) / 10, "b": _normal(48)}
_CONV_FEEDS: Final = ({"x": _normal(1, 32, 40)}, {"x": _normal(1, 32, 17)})
_IDS: Final = ({"i": _RANDOM.integers(0, 200, (1, 12)).astype(np.int32)},)
_TABLE: Final[dict[str, Any]] = {"w": _normal(200, 64), "k": np.float32(8)}

_BITS: Final = {8: 36.0, 4: 12.0}
"""Least ratio that the arithmetic of memory low leaves as well (8-bit activations)."""


def _quantised(kind: str, bits: int, *flags: str) -> GraphProbe:
    conv = kind == "conv"
    name = f"{kind}-int{bits}" + ("-blocks" if flags else "")
    return GraphProbe(
        id=name,
        asks=f"{'a convolution of 3' if conv else 'a linear'} with {bits}-bit weights{' in blocks' if flags else ''}",
        text=_CONV if conv else _LINEAR,
        constants=_CONV_CONSTANTS if conv else _LINEAR_CONSTANTS,
        feeds=_CONV_FEEDS if conv else _LINEAR_FEEDS,
        needed_by=_AUTOENCODER if conv else _ALL,
        flags=("--weightQuantBits", str(bits), "--weightQuantAsymmetric=1", *flags),
        settings=EVERY_SETTING,
        least_db=_BITS[bits],
    )


_AUTOENCODER: Final = (Component.DECODER, Component.ENCODER)

WEIGHTS: tuple[GraphProbe, ...] = (
    GraphProbe(
        id="linear",
        asks="a linear with float weights",
        text=_LINEAR,
        constants=_LINEAR_CONSTANTS,
        feeds=_LINEAR_FEEDS,
        needed_by=_ALL,
        settings=EVERY_SETTING,
    ),
    GraphProbe(
        id="linear-half",
        asks="a linear with float16 weights",
        text=_LINEAR,
        constants=_LINEAR_CONSTANTS,
        feeds=_LINEAR_FEEDS,
        needed_by=_ALL,
        flags=("--fp16",),
        settings=EVERY_SETTING,
        least_db=55,
    ),
    GraphProbe(
        id="conv",
        asks="a convolution of 3 with float weights, two lengths",
        text=_CONV,
        constants=_CONV_CONSTANTS,
        feeds=_CONV_FEEDS,
        needed_by=_AUTOENCODER,
        settings=EVERY_SETTING,
    ),
    _quantised("linear", 8),
    _quantised("linear", 8, "--weightQuantBlock", "16"),
    _quantised("linear", 4),
    _quantised("conv", 8),
    _quantised("conv", 4),
    GraphProbe(
        id="table-int8",
        asks="rows of an int8 table: Gather, Cast, Mul",
        text=_LOOKUP,
        constants=_TABLE,
        feeds=_IDS,
        needed_by=(Component.TEXT_ENCODER,),
        rewrite=lambda model: quantise_embedding(model, "int8"),
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
        rewrite=lambda model: quantise_embedding(model, "int4"),
        settings=PRECISIONS,
        least_db=15,
    ),
)
