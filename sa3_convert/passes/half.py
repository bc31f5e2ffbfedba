"""Halves: what they can hold, floats as sums of them, and constants rounded to them."""

from collections.abc import Set

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

HALF_LARGEST = 65504.0
HALF_NORMAL = 2.0**-14
"""Smallest magnitude with all 11 bits."""
HALF_SMALLEST = 2.0**-24
"""Smallest magnitude that is not zero."""

_SIGNIFICANT_BITS = 11
_TOP_EXPONENT = 15
_ROWS_AT_ONCE = 1 << 22


def is_exact_in_half(array: NDArray[np.float32]) -> bool:
    """Whether halving changes no element (and none lies where some back-ends flush to zero)."""
    finite = array[np.isfinite(array)]
    magnitudes = np.abs(finite[finite != 0])
    in_range = bool(((magnitudes >= HALF_NORMAL) & (magnitudes <= HALF_LARGEST)).all())
    return in_range and bool((finite.astype(np.float16).astype(np.float32) == finite).all())


def exact_parts(array: NDArray[np.float32]) -> list[tuple[NDArray[np.float32], int]]:
    """Split a finite float32 array into (part, exponent) pairs with array = Σ part · 2^exponent, exactly.

    The elements of a part are zero or normal half numbers; three do unless magnitudes differ by more than about 2¹⁸.
    """
    if not np.isfinite(array).all():
        raise ValueError("only finite numbers can be split")
    rest = array.astype(np.float64)
    parts = []
    while rest.any():
        exponent = int(np.frexp(np.abs(rest).max())[1]) - _TOP_EXPONENT
        mantissa, power = np.frexp(np.ldexp(rest, -exponent))
        part = np.ldexp(np.round(np.ldexp(mantissa, _SIGNIFICANT_BITS)), power - _SIGNIFICANT_BITS)
        part = np.where(np.abs(part) >= HALF_NORMAL, part, 0.0)
        parts.append((part.astype(np.float32), exponent))
        rest = rest - np.ldexp(part, exponent)
    return parts


def round_to_half(model: ir.Model, kept: Set[str] = frozenset()) -> int:
    """Round float32 initialisers to the nearest half number, still stored as float32, in place; return how many.

    Each is computed when the model is saved, so no two weights need be in memory at once. Magnitudes beyond 65504 keep
    their value for `fp16_safe` to judge; infinities stay, and so does what is in `kept`, which will be integers.
    """
    count = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if name in kept or tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        value.const_value = _rounded(tensor)
        count += 1
    return count


def _rounded(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        source = tensor.numpy()
        flat = np.ascontiguousarray(source).reshape(-1)
        result = np.empty(flat.shape, np.float32)
        for start in range(0, flat.size, _ROWS_AT_ONCE):
            piece = flat[start : start + _ROWS_AT_ONCE]
            # A magnitude beyond half's range would become infinite.
            kept = np.isfinite(piece) & (np.abs(piece) > HALF_LARGEST)
            with np.errstate(over="ignore"):
                result[start : start + _ROWS_AT_ONCE] = np.where(kept, piece, piece.astype(np.float16))
        return ir.Tensor(result.reshape(source.shape), name=tensor.name)

    return ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
