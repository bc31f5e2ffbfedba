"""The token table as integers with one scale per row, on a curve that spends levels where the numbers are.

    Gather(E, ids)  →  u·(1 + c·u²) · Gather(s, ids)     u = Cast(Gather(Q, ids)) / 2^(b−1)     E[r] ≈ s[r]·u·(1 + c·u²)

- int8: Q is int8, one byte a number.
- int4: two numbers to a byte, the first half of the columns in the high nibble. With b = 16·h + l, −8 ≤ h < 8 and
  0 ≤ l < 16, the numbers are h = Floor(b / 16) and l − 8; all of it is exact in float32.

The curve (one c per table, 0 for evenly spaced levels) costs no bytes. Levels that grow outwards suit bell-shaped
numbers: at 8 bits Gaussian rows gain 1.7 dB (42.4 → 44.0) and heavy-tailed ones (Student's t, 4 degrees) 5.5 dB; at 4
bits 0.7 and 3 dB. c is the candidate of least squared error on a sample of rows, and the scale of each row is searched
for least squared error, too; at 4 bits it may be negative, because the integers reach one step further on that side.

In these spellings MNN computes what ONNX Runtime does, bit for bit; DequantizeLinear behind the Gather gives wrong
numbers without a word.

Nothing is done with a Gather whose table is not a two-dimensional float32 constant, is used elsewhere too or is an
output, whose axis is not 0, or whose ids are constant (lookups in small tables of the network itself); and for int4
when the width is odd.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.arrays import Floats
from sa3_convert.passes import ir_tools

_CURVES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Candidates for c; float16 holds each, so halving the constants changes nothing."""
_RATIOS = {8: (1.0,), 4: (0.65, 0.8, 0.95)}
"""Where the search for a row's scale starts, as fractions of the scale that reaches the largest magnitude."""
_SIDES = {8: (1,), 4: (1, -1)}
_ROWS_AT_ONCE = 2048
_SAMPLE = 512


@dataclass(frozen=True)
class QuantisedRows:
    """A table as integers."""

    codes: NDArray[np.int8]
    """[rows, width], −2^(bits−1) … 2^(bits−1) − 1."""
    scales: Floats
    """[rows, 1]."""
    bits: Literal[4, 8]
    curve: float

    def dequantised(self) -> Floats:
        """Return [rows, width], rounded in each step as the graph rounds."""
        return _curved(self.codes.astype(np.float32) * _step(self.bits), self.curve) * self.scales


def quantise_embedding(model: ir.Model, kind: Literal["int8", "int4"], *, half_scales: bool = False) -> int:
    """Replace each token table, in place.

    Args:
        model: rewritten in place; the integers are computed here (a byte or half a byte per number of memory).
        kind: how the numbers are stored.
        half_scales: use only scales that float16 holds, because the converter will halve them.

    Returns:
        How many tables were replaced.

    """
    bits: Literal[4, 8] = 8 if kind == "int8" else 4
    count = 0
    for node in list(model.graph):
        if not _is_token_lookup(node, bits):
            continue
        assert node.inputs[0] is not None
        rows = quantise_rows(ir_tools.array(node.inputs[0]), bits, half_scales=half_scales)
        _Replacement(model.graph, node, rows).apply()
        count += 1
    return count


def quantise_rows(
    table: NDArray[np.generic], bits: Literal[4, 8], *, half_scales: bool = False, curve: float | None = None
) -> QuantisedRows:
    """Quantise each row of [rows, width], read in blocks, on a curve (`best_curve`), with the scale of least error."""
    if curve is None:
        curve = best_curve(table, bits, half_scales=half_scales)
    codes = np.empty(table.shape, np.int8)
    scales = np.empty((table.shape[0], 1), np.float32)
    for start in range(0, table.shape[0], _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        codes[block], scales[block], _ = _search(table[block].astype(np.float32), bits, curve, half_scales)
    return QuantisedRows(codes, scales, bits, curve)


def best_curve(table: NDArray[np.generic], bits: Literal[4, 8], *, half_scales: bool = False) -> float:
    """Return the candidate for c that has the least squared error on rows evenly spread over the table."""
    sample = table[:: max(1, table.shape[0] // _SAMPLE)].astype(np.float32)
    return min(_CURVES, key=lambda c: float(_search(sample, bits, c, half_scales)[2].sum()))


def pack(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return [rows, width/2] bytes for [rows, width] codes in −8 … 7."""
    high, low = np.split(codes.astype(np.int16), 2, axis=1)
    return (16 * high + low + 8).astype(np.int8)


def _search(rows: Floats, bits: int, curve: float, half: bool) -> tuple[NDArray[np.int8], Floats, Floats]:
    """Return codes, scales and squared error of each row at the best scale found."""
    reach = np.abs(rows).max(axis=1, keepdims=True)
    reach[reach == 0] = 1
    best_error = np.full(reach.shape, np.inf, np.float32)
    best_scale = np.ones(reach.shape, np.float32)
    best_codes = np.zeros(rows.shape, np.int8)
    ends = {side: top * float(_step(bits)) for side, top in _ends(bits).items()}
    outermost = {side: np.float32(end * (1 + curve * end**2)) for side, end in ends.items()}
    for ratio in _RATIOS[bits]:
        for side in _SIDES[bits]:
            scale = _storable(reach * np.float32(ratio * side) / outermost[side], half)
            # For given codes the best scale is a projection; it is judged by the codes that it gets itself.
            levels = _curved(_nearest(rows / scale, bits, curve) * _step(bits), curve)
            scale = _storable(_projection(rows, levels, scale), half)
            codes = _nearest(rows / scale, bits, curve)
            error = np.square(rows - _curved(codes * _step(bits), curve) * scale).sum(axis=1, keepdims=True)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best_scale = np.where(better, scale, best_scale)
            best_codes = np.where(better, codes.astype(np.int8), best_codes)
    return best_codes, best_scale, best_error


def _ends(bits: int) -> dict[int, int]:
    return {1: 2 ** (bits - 1) - 1, -1: 2 ** (bits - 1)}


def _step(bits: int) -> np.float32:
    return np.float32(2.0 ** (1 - bits))


def _curved(u: Floats, curve: float) -> Floats:
    result: Floats = u * (np.float32(1) + np.float32(curve) * (u * u))
    return result


def _nearest(levels: Floats, bits: int, curve: float) -> Floats:
    """Return the codes, as floats, whose places on the curve are nearest to `levels`."""
    step = _step(bits)
    u = levels
    if curve:
        # The real root of u + c·u³ = level; then the middle between two places on the curve, which is not the middle
        # between their codes, is moved there: by y″·step²/8 along the curve, y″/y′·step²/8 in codes.
        root = np.float32(np.sqrt(3 * curve))
        u = 2 / root * np.sinh(np.arcsinh(np.float32(1.5) * root * levels) / 3)
        u = u - step * step / 8 * (6 * curve * u) / (1 + 3 * curve * u * u)
    codes: Floats = np.clip(np.rint(u / step), -_ends(bits)[-1], _ends(bits)[1])
    return codes


def _projection(rows: Floats, levels: Floats, otherwise: Floats) -> Floats:
    length = np.square(levels).sum(axis=1, keepdims=True)
    along = (rows * levels).sum(axis=1, keepdims=True)
    usable = (length > 0) & (along != 0)
    projected: Floats = np.where(usable, along / np.where(usable, length, 1), otherwise)
    return projected


def _storable(scale: Floats, half: bool) -> Floats:
    return scale.astype(np.float16).astype(np.float32) if half else scale.astype(np.float32)


def _is_token_lookup(node: ir.Node, bits: int) -> bool:
    if node.op_type != "Gather" or node.domain or ir_tools.attribute_int(node, "axis", 0) != 0:
        return False
    table, ids = node.inputs
    tensor = ir_tools.constant_tensor(table)
    if table is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
        return False
    alone = len(table.uses()) == 1 and not table.is_graph_output()
    return alone and ir_tools.constant_tensor(ids) is None and (bits == 8 or tensor.shape.numpy()[1] % 2 == 0)


class _Replacement:
    """The nodes that stand for one lookup."""

    def __init__(self, graph: ir.Graph, gather: ir.Node, rows: QuantisedRows) -> None:
        self.graph, self.gather, self.rows = graph, gather, rows
        table, ids = gather.inputs
        assert table is not None
        assert ids is not None
        self.table, self.ids = table, ids
        self.new = ir_tools.Additions(graph)

    def apply(self) -> None:
        numbers = self._packed() if self.rows.bits == 4 else self._stored(self.rows.codes)
        u = self._add("Mul", [numbers, self._number("step", float(_step(self.rows.bits)))], "u")
        levels = u
        if self.rows.curve:
            bend = self._add(
                "Mul", [self._add("Mul", [u, u], "square"), self._number("curve", self.rows.curve)], "bend"
            )
            levels = self._add("Mul", [u, self._add("Add", [bend, self._number("one", 1)], "slope")], "levels")
        scales = self._constant("scales", self.rows.scales)
        row_scales = self._add("Gather", [scales, self.ids], "row_scales", axis=0)
        self._finish(self._add("Mul", [levels, row_scales], "dequantised"))

    def _stored(self, codes: NDArray[np.int8]) -> ir.Value:
        table = self._constant(f"int{self.rows.bits}", codes)
        stored = self._add("Gather", [table, self.ids], "stored", dtype=ir.DataType.INT8, axis=0)
        return self._add("Cast", [stored], "numbers", to=ir.DataType.FLOAT.value)

    def _packed(self) -> ir.Value:
        numbers = self._stored(pack(self.rows.codes))
        high = self._add("Floor", [self._add("Mul", [numbers, self._number("sixteenth", 1 / 16)], "shifted")], "high")
        high_part = self._add("Mul", [high, self._number("sixteen", 16)], "high_part")
        low = self._add("Sub", [numbers, high_part], "low")
        low = self._add("Sub", [low, self._number("eight", 8)], "low_signed")
        return self._add("Concat", [high, low], "unpacked", axis=-1)

    def _finish(self, dequantised: ir.Value) -> None:
        result = self.gather.outputs[0]
        dequantised.shape, dequantised.type = result.shape, result.type
        self.new.insert_before(self.gather)
        dequantised.name, result.name = result.name, dequantised.name
        result.replace_all_uses_with(dequantised, replace_graph_outputs=True)
        self.graph.remove(self.gather, safe=True)
        ir_tools.remove_unused(self.graph, [self.table])

    def _constant(self, name: str, array: NDArray[np.generic] | np.generic) -> ir.Value:
        return self.new.constant(f"{self.table.name}.{name}", array)

    def _number(self, name: str, number: float) -> ir.Value:
        return self._constant(name, np.float32(number))

    def _add(
        self, operator: str, inputs: list[ir.Value], name: str, dtype: ir.DataType = ir.DataType.FLOAT, **numbers: int
    ) -> ir.Value:
        return self.new.node(operator, inputs, f"{self.table.name}.{name}", dtype, None, **numbers)
