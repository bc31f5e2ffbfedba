"""Seeded inputs for any ONNX graph, from what the graph says of them: names, types, dimensions, and what uses them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.errors import InputError
from sa3_convert.passes import _graph
from sa3_convert.verify.inputs import Sample

LENGTHS: Final = (8, 33, 64)
"""Values of every named dimension; a graph may refuse some, such as odd ones."""
SEEDS: Final = 2

_PRODUCT = re.compile(r"(?:(\d+) ?\* ?)?([A-Za-z_]\w*)(?: ?\+ ?(\d+))?")
_VIEWS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_LONGEST_SECONDS = 384.0


def any_samples(model: ir.Model) -> Iterator[Sample]:
    """Yield inputs of several lengths, if the graph has any, and seeds.

    Floats are normal, but for `t`, from 0 to 1, `seconds`, up to the longest duration, and a mask of floats, ones (what
    is computed behind the end of a mask means nothing). Integers that look up rows are rows of their table; others are
    masks: ones, then zeros.

    Raises:
        InputError: an input has a type that numbers cannot be made up for.

    """
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    dynamic = any(not isinstance(size, int) for value in inputs for size in value.shape or ())
    for length in LENGTHS if dynamic else LENGTHS[:1]:
        for seed in range(SEEDS):
            random = np.random.default_rng([seed, length])
            feeds = {str(value.name): _array(value, length, random) for value in inputs}
            yield Sample(f"seed={seed}" + (f" length={length}" if dynamic else ""), length, feeds)


def sample_of(model: ir.Model, name: str, feeds: Mapping[str, NDArray[Any]]) -> Sample:
    """Return inputs that were given, which must be those of the graph.

    Raises:
        InputError: one is missing or unknown.

    """
    wanted = [str(value.name) for value in model.graph.inputs if value.name not in model.graph.initializers]
    if set(wanted) != set(feeds):
        raise InputError(f"{name} holds {', '.join(feeds) or 'nothing'}; the graph takes {', '.join(wanted)}.")
    return Sample(name, 0, feeds)


def _array(value: ir.Value, length: int, random: np.random.Generator) -> NDArray[Any]:
    if value.dtype is None or value.shape is None:
        raise InputError(f"The graph does not state type and shape of its input {value.name!r}; give --input.")
    shape = tuple(_size(size, length) for size in value.shape)
    kind = value.dtype.numpy()
    if value.dtype == ir.DataType.BOOL or kind.kind in "iu":
        rows = _rows(value)
        if rows is not None:
            return random.integers(0, rows, shape).astype(kind)
        ones = random.integers(1, shape[-1] + 1) if shape else 1
        return np.broadcast_to(np.arange(shape[-1] if shape else 1) < ones, shape or (1,)).reshape(shape).astype(kind)
    if kind.kind != "f":
        raise InputError(f"No numbers can be made up for the input {value.name!r} of type {value.dtype}; give --input.")
    name = value.name or ""
    if name.endswith("mask"):
        return np.ones(shape, kind)
    if name in ("t", "seconds"):
        return (random.uniform(0, 1 if name == "t" else _LONGEST_SECONDS, shape)).astype(kind)
    return random.standard_normal(shape).astype(kind)


def _size(size: int | ir.SymbolicDim, length: int) -> int:
    """Return a dimension when each name in it stands for `length`: 16·length for "16*T"."""
    if isinstance(size, int):
        return size
    parts = _PRODUCT.fullmatch(str(size.value or ""))
    return length if parts is None else int(parts[1] or 1) * length + int(parts[3] or 0)


def _rows(value: ir.Value) -> int | None:
    """Return how many rows the smallest table has that a value looks up in, or None if it looks up in none."""
    found: list[int] = []
    pending, seen = [value], {value}
    while pending:
        for node, index in pending.pop().uses():
            if node.op_type == "Gather" and index == 1:
                table = node.inputs[0]
                axis = _graph.attribute_int(node, "axis", 0)
                rows = None if table is None or table.shape is None else table.shape[axis]
                found += [rows] if isinstance(rows, int) else []
            elif node.op_type in _VIEWS and index == 0 and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                pending.append(node.outputs[0])
    return min(found, default=None)
