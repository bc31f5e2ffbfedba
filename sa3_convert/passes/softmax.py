"""Softmax that no backend gets wrong: where a row could be low, its maximum is subtracted first."""

import math
from typing import Final

import numpy as np
import onnx_ir as ir

from sa3_convert.mnn.compatibility import MnnVersion
from sa3_convert.passes import ir_tools


def lowest_row_maximum(softmax: ir.Node) -> float:
    """Return a number that no row maximum of a Softmax's input is below; −∞ if none is known.

    Masks of the form m·(1 − m) are taken to be made of zeros and ones, as the components' contract says.
    """
    logits = softmax.inputs[0]
    if logits is None or not _is_last_axis(logits, ir_tools.attribute_int(softmax, "axis", -1)):
        return -math.inf
    for masked, mask in ir_tools.either_order(ir_tools.produced(logits, "Add")):
        if mask is not None and _leaves_a_key(mask):
            logits = masked
            break
    return -_largest_magnitude(logits)


def _largest_magnitude(logits: ir.Value | None) -> float:
    """Bound c·tanh(…) or q·kᵀ."""
    for bounded, factor in ir_tools.either_order(ir_tools.produced(logits, "Mul")):
        cap = ir_tools.scalar(factor)
        if cap is not None and ir_tools.produced(bounded, "Tanh") is not None:
            return abs(cap)
    product = ir_tools.produced(logits, "MatMul")
    transposed = None if product is None else ir_tools.produced(product.inputs[1], "Transpose")
    order = [] if transposed is None else _order(transposed)
    if product is None or transposed is None or len(order) < 2 or order[-2:] != [len(order) - 1, len(order) - 2]:
        return math.inf
    return _longest_row(product.inputs[0]) * _longest_row(transposed.inputs[0])


def _longest_row(value: ir.Value | None) -> float:
    """Bound the Euclidean norm of each row over the last axis."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain:
        return math.inf
    first = node.inputs[0]
    match node.op_type:
        case "Tanh":
            return math.sqrt(_width(value))
        case "Transpose" if _order(node)[-1:] == [len(_order(node)) - 1]:
            return _longest_row(first)
        case "Mul":
            return _longest_product(value, node)
        case "Add":
            for moved, constant in ir_tools.either_order(node):
                offset = _per_channel(constant, _width(value))
                if offset is not None:
                    return _longest_row(moved) + float(np.linalg.norm(offset))
        case "Concat":
            return _longest_rotated(node)
    return math.inf


def _longest_product(value: ir.Value, node: ir.Node) -> float:
    width = _width(value)
    for scaled, factor in ir_tools.either_order(node):
        gains = _per_channel(factor, width)
        if gains is not None:
            return float(np.abs(gains).max()) * _longest_row(scaled)
        reciprocal = ir_tools.produced(factor, "Reciprocal")
        if scaled is not None and reciprocal is not None:
            eps = ir_tools.rms_eps(reciprocal, scaled)
            if eps is not None and (ir_tools.scalar(eps.inputs[1]) or 0) >= 0:
                return math.sqrt(width)
    return math.inf


def _longest_rotated(concat: ir.Node) -> float:
    """Bound (a·cos − b·sin, b·cos + a·sin, rest) with (a, b, rest) the parts of one value."""
    axis = ir_tools.attribute_int(concat, "axis", 0)
    if len(concat.inputs) not in (2, 3) or not _is_last_axis(concat.outputs[0], axis):
        return math.inf
    left, right = ir_tools.produced(concat.inputs[0], "Sub"), ir_tools.produced(concat.inputs[1], "Add")
    split = None if left is None else _split_behind(left.inputs[0])
    if left is None or right is None or split is None or len(split.outputs) != len(concat.inputs):
        return math.inf
    a, b, *rest = split.outputs
    cos, sin = _factor(left.inputs[0], a), _factor(left.inputs[1], b)
    rotates = _factor(right.inputs[0], b) is cos and _factor(right.inputs[1], a) is sin
    if cos is None or sin is None or not rotates or list(concat.inputs[2:]) != rest:
        return math.inf
    return _longest_unit(cos, sin) * _longest_row(split.inputs[0])


def _split_behind(product: ir.Value | None) -> ir.Node | None:
    """Return the Split along the last axis whose part is multiplied."""
    node = ir_tools.produced(product, "Mul")
    for part in () if node is None else node.inputs:
        split = ir_tools.produced(part, "Split")
        if split is not None and _is_last_axis(part, ir_tools.attribute_int(split, "axis", 0)):
            return split
    return None


def _factor(product: ir.Value | None, value: ir.Value) -> ir.Value | None:
    """Return what a value is multiplied with."""
    node = ir_tools.produced(product, "Mul")
    if node is None or value not in node.inputs:
        return None
    first, second = node.inputs
    return second if first is value else first


def _longest_unit(cos: ir.Value, sin: ir.Value) -> float:
    """Bound √(cos² + sin²): 1 for the cosine and sine of one phase, what constant tables hold otherwise."""
    cosine, sine = ir_tools.produced(cos, "Cos"), ir_tools.produced(sin, "Sin")
    if cosine is not None and sine is not None:
        return 1.0 if cosine.inputs[0] is sine.inputs[0] else math.sqrt(2)
    tables = [ir_tools.constant_tensor(table) for table in (cos, sin)]
    if tables[0] is None or tables[1] is None or tables[0].shape != tables[1].shape:
        return math.inf
    return float(np.hypot(*(table.numpy().astype(np.float64) for table in tables if table is not None)).max())


def _leaves_a_key(mask: ir.Value) -> bool:
    """Whether an additive mask is 0 for at least one key of every row."""
    node = mask.producer()
    while node is not None and node.op_type == "Unsqueeze" and _keeps_the_last_axis(node):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None:
        return False
    if node.op_type == "Pad":
        return _pads_zeros(node)
    if node.op_type != "Mul":
        return False
    return any(
        ir_tools.scalar(factor) is not None and _hides_from_tokens_only(product)
        for product, factor in ir_tools.either_order(node)
    )


def _pads_zeros(pad: ir.Node) -> bool:
    """Whether zeros are put beside the last axis of all dimensions."""
    mode = pad.attributes.get("mode")
    pads = ir_tools.constant_tensor(pad.inputs[1])
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    if (mode is not None and mode.as_string() != "constant") or pads is None:
        return False
    if (value is not None and ir_tools.scalar(value) != 0) or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return False
    before, after = np.split(pads.numpy(), 2)
    return bool(before[-1] > 0 or after[-1] > 0)


def _hides_from_tokens_only(value: ir.Value | None) -> bool:
    """Whether a value is m_q·(1 − m_k) of one mask m, over queries and keys."""
    for queries, keys in ir_tools.either_order(ir_tools.produced(value, "Mul")):
        unseen = ir_tools.produced(_without_unsqueezes(keys), "Sub")
        if unseen is None or ir_tools.scalar(unseen.inputs[0]) != 1:
            continue
        if _last_sizes(queries)[1:] == (1,) and _last_sizes(keys)[:1] == (1,):
            return unseen.inputs[1] is _without_unsqueezes(queries)
    return False


def _without_unsqueezes(value: ir.Value | None) -> ir.Value | None:
    while (node := ir_tools.produced(value, "Unsqueeze")) is not None:
        value = node.inputs[0]
    return value


def _last_sizes(value: ir.Value | None) -> tuple[object, ...]:
    return () if value is None or value.shape is None else tuple(value.shape)[-2:]


def _keeps_the_last_axis(unsqueeze: ir.Node) -> bool:
    axes, shape = ir_tools.constant_tensor(unsqueeze.inputs[1]), unsqueeze.outputs[0].shape
    return axes is not None and shape is not None and not {-1, len(shape) - 1} & set(axes.numpy().tolist())


def _is_last_axis(value: ir.Value | None, axis: int) -> bool:
    return axis == -1 or (value is not None and value.shape is not None and axis == len(value.shape) - 1)


def _order(transpose: ir.Node) -> list[int]:
    """Return which axis goes where; empty when the graph leaves it to the default."""
    return list(transpose.attributes["perm"].as_ints()) if "perm" in transpose.attributes else []


def _per_channel(value: ir.Value | None, width: float) -> np.ndarray | None:
    """Return a constant scalar or vector over the last axis as [width]."""
    tensor = ir_tools.constant_tensor(value)
    if tensor is None or not math.isfinite(width) or tensor.size not in (1, width):
        return None
    if tensor.size > 1 and tensor.shape[-1] != width:
        return None
    return np.broadcast_to(tensor.numpy().astype(np.float64).reshape(-1), (int(width),))


def _width(value: ir.Value) -> float:
    """Return the size of the last axis; infinity if it is not fixed."""
    size = None if value.shape is None or not len(value.shape) else value.shape[-1]
    return size if isinstance(size, int) else math.inf


NEEDED_BEFORE: Final[MnnVersion] = "3.6"
"""Lint and pipeline ask for it below this version."""
LOWEST_SAFE = -64.0
"""exp(−64) is 2·10⁻²⁸: what lies up to 23 below such a maximum, a weight of 10⁻¹⁰, is still a normal float32."""


def needs_shift(softmax: ir.Node) -> bool:
    """Whether a row of a Softmax's input may be so low that MNN before 3.6 gets it wrong on CUDA."""
    logits = softmax.inputs[0]
    if logits is None:
        return True
    if ir_tools.is_shifted_by_its_maximum(logits):
        return False
    # Zero times no bound is NaN, which is no bound either.
    return not lowest_row_maximum(softmax) >= LOWEST_SAFE


def subtract_row_maximum(model: ir.Model) -> int:
    """Shift the input of each Softmax that needs it, in place; return how many."""
    graph = model.graph
    new = ir_tools.Additions(graph)
    count = 0
    for node in list(graph):
        if node.op_type not in ("Softmax", "LogSoftmax") or node.domain:
            continue
        logits = node.inputs[0]
        if logits is None or logits.dtype != ir.DataType.FLOAT or not needs_shift(node):
            continue
        axis = np.array([ir_tools.attribute_int(node, "axis", -1)], np.int64)
        axes = new.constant(f"{logits.name}.axes", axis)
        maximum = new.node("ReduceMax", [logits, axes], f"{logits.name}.maximum", keepdims=1)
        shifted = new.node("Sub", [logits, maximum], f"{logits.name}.shifted", shape=logits.shape)
        new.insert_before(node)
        node.replace_input_with(0, shifted)
        count += 1
    return count
