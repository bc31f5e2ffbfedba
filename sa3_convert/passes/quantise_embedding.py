"""The token table as integers with one scale per row.

    Gather(E, ids)  →  Cast(Gather(Q, ids)) · Gather(s, ids)         E[r] ≈ s[r]·Q[r]

- int8: Q is int8, one byte a number.
- int4: two numbers to a byte, the first half of the columns in the high nibble. With b = 16·h + l, −8 ≤ h < 8 and
  0 ≤ l < 16, the numbers are h = Floor(b / 16) and l − 8; all of it is exact in float32.

In these spellings MNN computes what ONNX Runtime does, bit for bit; DequantizeLinear behind the Gather gives wrong
numbers without a word. The scale of each row is the one, of a search from coarse to fine, with the least squared error;
it may be negative, because the integers reach one step further on that side.

Nothing is done with a Gather whose table is not a two-dimensional float32 constant, is used elsewhere too or is an
output, whose axis is not 0, or whose ids are constant (lookups in small tables of the network itself); and for int4
when the width is odd.
"""

from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.passes import _graph

_ROWS_AT_ONCE = 2048
_RATIOS = {8: np.linspace(0.95, 1, 4, dtype=np.float32), 4: np.linspace(0.45, 1, 12, dtype=np.float32)}
"""Candidates, as a fraction of the scale that reaches the largest magnitude; more of them gain less than 0.1 dB."""


def quantise_embedding(model: ir.Model, kind: Literal["int8", "int4"], *, half_scales: bool = False) -> int:
    """Replace each token table, in place.

    Args:
        model: rewritten in place; the integers are computed here (a byte or half a byte per number of memory).
        kind: how the numbers are stored.
        half_scales: use only scales that float16 holds, because the converter will halve them.

    Returns:
        How many tables were replaced.

    """
    bits = 8 if kind == "int8" else 4
    count = 0
    for node in list(model.graph):
        if not _is_token_lookup(node, bits):
            continue
        table, ids = node.inputs
        assert table is not None
        assert ids is not None
        codes, scales = quantise_rows(_graph.array(table), bits, half_scales=half_scales)
        _replace(model.graph, node, table, ids, codes if bits == 8 else pack(codes), scales, bits)
        count += 1
    return count


def quantise_rows(
    table: NDArray[np.generic], bits: int, *, half_scales: bool = False
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise each row with the scale of least squared error.

    Args:
        table: [rows, width] float; read in blocks, so it may be a memory-mapped file.
        bits: 4 or 8.
        half_scales: use only scales that float16 holds exactly.

    Returns:
        codes [rows, width] int8 in −2^(bits−1) … 2^(bits−1) − 1, and scales [rows, 1] float32.

    """
    codes = np.empty(table.shape, np.int8)
    scales = np.empty((table.shape[0], 1), np.float32)
    for start in range(0, table.shape[0], _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        codes[block], scales[block] = _quantised(table[block].astype(np.float32), bits, half_scales)
    return codes, scales


def pack(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return [rows, width/2] bytes for [rows, width] codes in −8 … 7."""
    high, low = np.split(codes.astype(np.int16), 2, axis=1)
    return (16 * high + low + 8).astype(np.int8)


def _quantised(rows: NDArray[np.float32], bits: int, half: bool) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    top = 2 ** (bits - 1) - 1
    reach = np.abs(rows).max(axis=1, keepdims=True)
    reach[reach == 0] = 1
    best_error = np.full(reach.shape, np.inf, np.float32)
    best_scale = np.ones(reach.shape, np.float32)
    for ratio in _RATIOS[bits]:
        for side in (top, -(top + 1)):
            # Towards the largest magnitude of either sign the integers reach top or top + 1 steps.
            scale = _storable(reach * ratio / np.float32(side), half)
            codes = _codes(rows, scale, top)
            # For given integers the best scale is a projection; it is tried as it is and judged by its own integers.
            scale = _storable(_projection(rows, codes, scale), half)
            error = np.square(rows - _codes(rows, scale, top) * scale).sum(axis=1, keepdims=True)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best_scale = np.where(better, scale, best_scale)
    return _codes(rows, best_scale, top).astype(np.int8), best_scale


def _codes(rows: NDArray[np.float32], scale: NDArray[np.float32], top: int) -> NDArray[np.float32]:
    codes: NDArray[np.float32] = np.clip(np.rint(rows / scale), -top - 1, top)
    return codes


def _projection(
    rows: NDArray[np.float32], codes: NDArray[np.float32], otherwise: NDArray[np.float32]
) -> NDArray[np.float32]:
    length = np.square(codes).sum(axis=1, keepdims=True)
    along = (rows * codes).sum(axis=1, keepdims=True)
    usable = (length > 0) & (along != 0)
    projected: NDArray[np.float32] = np.where(usable, along / np.where(usable, length, 1), otherwise)
    return projected


def _storable(scale: NDArray[np.float32], half: bool) -> NDArray[np.float32]:
    return scale.astype(np.float16).astype(np.float32) if half else scale.astype(np.float32)


def _is_token_lookup(node: ir.Node, bits: int) -> bool:
    if node.op_type != "Gather" or node.domain or _graph.attribute_int(node, "axis", 0) != 0:
        return False
    table, ids = node.inputs
    tensor = _graph.constant_tensor(table)
    if table is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
        return False
    alone = len(table.uses()) == 1 and not table.is_graph_output()
    return alone and _graph.constant_tensor(ids) is None and (bits == 8 or tensor.shape.numpy()[1] % 2 == 0)


def _replace(
    graph: ir.Graph,
    gather: ir.Node,
    table: ir.Value,
    ids: ir.Value,
    stored: NDArray[np.int8],
    scales: NDArray[np.float32],
    bits: int,
) -> None:
    taken = _graph.names_in(graph)
    result = gather.outputs[0]
    nodes: list[ir.Node] = []

    def constant(name: str, array: NDArray[np.generic]) -> ir.Value:
        return _graph.add_constant(graph, _graph.unused_name(f"{table.name}.{name}", taken), array)

    def add(operator: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        unique = _graph.unused_name(f"{table.name}.{name}", taken)
        dtype = ir.DataType.INT8 if name == "stored" else ir.DataType.FLOAT
        node = ir.node(operator, inputs, attributes, outputs=[ir.val(unique, dtype)], name=unique)
        nodes.append(node)
        return node.outputs[0]

    numbers = add("Gather", [constant(f"int{bits}", stored), ids], "stored", axis=0)
    numbers = add("Cast", [numbers], "numbers", to=ir.DataType.FLOAT.value)
    if bits == 4:
        sixteen, eight = constant("sixteen", np.array(16, np.float32)), constant("eight", np.array(8, np.float32))
        sixteenth = constant("sixteenth", np.array(1 / 16, np.float32))
        high = add("Floor", [add("Mul", [numbers, sixteenth], "shifted")], "high")
        low = add("Sub", [add("Sub", [numbers, add("Mul", [high, sixteen], "high_part")], "low"), eight], "low_signed")
        numbers = add("Concat", [high, low], "unpacked", axis=-1)
    row_scales = add("Gather", [constant("scales", scales), ids], "row_scales", axis=0)
    dequantised = add("Mul", [numbers, row_scales], "dequantised")
    dequantised.shape, dequantised.type = result.shape, result.type
    graph.insert_before(gather, nodes)
    if result.is_graph_output():
        name, result.name = result.name, dequantised.name
        dequantised.name = name
    result.replace_all_uses_with(dequantised, replace_graph_outputs=True)
    graph.remove(gather, safe=True)
    _graph.remove_unused(graph, [table])
