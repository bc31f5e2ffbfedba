"""A gated MLP before an RMS norm is scaled by a power of two so that its product cannot leave half's range.

    p = a(x·G) ∘ (x·U)          →    p·s = a(x·G) ∘ (x·(U·s))
    z = p·D                     →    z·s
    z / sqrt(mean(z²) + ε)      →    z·s / sqrt(mean((z·s)²) + ε·s²)        the same

with a(g) = g·h(g) and |h| ≤ 1 (GELU, SiLU). As s is a power of two, every float32 result is the same bit for bit (as
long as none is denormal). MNN on CUDA rounds the inputs of every Linear to half, which ends at 65504; T5Gemma's product
is the one of them that nothing bounds but the norm before: x = γ∘n, ‖n‖₂ ≤ √d, so by Cauchy and Schwarz

    |p_i| ≤ d · ‖γ∘G_i‖₂ · ‖γ∘U_i‖₂        for every input

and s is the largest power of two up to 1 with which the largest of these bounds is at most 2¹⁵. No calibration is
needed, and no input can overflow.

Nothing is done where the bound is small enough as it is, where a weight is used elsewhere too, where the MLP does not
stand between two norms, and with activations of another kind.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.passes import ir_tools

LARGEST_BOUND = 2.0**15
"""Half of half's range: what is left is room for rounding."""


@dataclass(frozen=True)
class GatedProduct:
    """One MLP between two norms."""

    up: ir.Value
    """The weight that is scaled, [d, inner]."""
    bound: float
    """No element of the product is larger, whatever the input."""
    eps: ir.Node
    """The Add of the following norm's ε."""


def scale_gated_products(model: ir.Model) -> int:
    """Scale, in place, the MLPs that need it; return how many."""
    new = ir_tools.Additions(model.graph)
    count = 0
    for found in gated_products(model):
        if not math.isfinite(found.bound) or found.bound <= LARGEST_BOUND:
            continue
        scale = 2.0 ** -math.ceil(math.log2(found.bound / LARGEST_BOUND))
        _scale_weight(found.up, scale)
        _scale_eps(new, found.eps, scale**2)
        count += 1
    return count


def gated_products(model: ir.Model) -> list[GatedProduct]:
    """Return the MLPs whose product can be scaled, in graph order."""
    found = []
    for node in model.graph:
        if node.op_type != "MatMul" or _weight(node) is None:
            continue
        eps = _norm_behind(node.outputs[0])
        product = ir_tools.produced(node.inputs[0], "Mul")
        if eps is None or product is None or not _used_once(product.outputs[0]):
            continue
        matches = (_matched(gated, up, eps) for gated, up in ir_tools.either_order(product))
        if match := next(filter(None, matches), None):
            found.append(match)
    return found


def _matched(gated: ir.Value | None, up: ir.Value | None, eps: ir.Node) -> GatedProduct | None:
    """Recognise a(x·G) and x·U with the same normalised x."""
    gate, factor = _gate(gated)
    up_node = ir_tools.produced(up, "MatMul")
    if gate is None or up_node is None or up_node.inputs[0] is not gate.inputs[0]:
        return None
    weights = _weight(gate), _weight(up_node)
    gamma = _gamma(up_node.inputs[0])
    if weights[0] is None or weights[1] is None or gamma is None:
        return None
    if not (_used_once(weights[1]) and _used_once(up_node.outputs[0])):
        return None
    norms = [np.linalg.norm(gamma[:, None] * ir_tools.array(w).astype(np.float32), axis=0) for w in weights]  # type: ignore[arg-type]
    bound = factor * gamma.size * float(np.max(norms[0].astype(np.float64) * norms[1]))
    return GatedProduct(weights[1], bound, eps)


def _gate(value: ir.Value | None) -> tuple[ir.Node | None, float]:
    """Return the Linear behind g·h(g) and the largest |h|."""
    for linear, gate in ir_tools.either_order(ir_tools.produced(value, "Mul")):
        node, largest = ir_tools.produced(linear, "MatMul"), _largest(gate)
        if node is not None and largest is not None:
            return node, largest
    return None, 0


def _largest(value: ir.Value | None) -> float | None:
    """Return the largest magnitude of Sigmoid(…), or of c·(1 + Tanh(…)) or c·(1 + Erf(…))."""
    if ir_tools.produced(value, "Sigmoid") is not None:
        return 1.0
    for constant, shifted in ir_tools.either_order(ir_tools.produced(value, "Mul")):
        factor = ir_tools.scalar(constant)
        for one, bounded in ir_tools.either_order(ir_tools.produced(shifted, "Add")):
            is_bounded = ir_tools.produced(bounded, "Tanh") or ir_tools.produced(bounded, "Erf")
            if factor is not None and ir_tools.scalar(one) == 1 and is_bounded:
                return 2 * abs(factor)
    return None


def _gamma(value: ir.Value | None) -> NDArray[np.float32] | None:
    """Return the gain of the RMS norm that makes a value."""
    for normalised, gain in ir_tools.either_order(ir_tools.produced(value, "Mul")):
        if ir_tools.constant_tensor(gain) is None or gain is None:
            continue
        for source, reciprocal in ir_tools.either_order(ir_tools.produced(normalised, "Mul")):
            if source is not None and ir_tools.rms_eps(ir_tools.produced(reciprocal, "Reciprocal"), source) is not None:
                array = np.asarray(ir_tools.array(gain), np.float32)
                return array if array.ndim == 1 else None
    return None


def _norm_behind(value: ir.Value) -> ir.Node | None:
    """Return the Add of ε of the RMS norm that alone uses a value, or None."""
    users = [node for node, _ in value.uses()]
    scaled = [node for node in users if node.op_type == "Mul"]
    powers = [node for node in users if node.op_type == "Pow"]
    if value.is_graph_output() or len(users) != 2 or len(scaled) != 1 or len(powers) != 1:
        return None
    other = next((i for i in scaled[0].inputs if i is not value), None)
    return ir_tools.rms_eps(ir_tools.produced(other, "Reciprocal"), value)


def _used_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _weight(node: ir.Node) -> ir.Value | None:
    """Return the constant of a Linear, if it is two-dimensional float32 and computed by nothing."""
    value = node.inputs[1]
    tensor = ir_tools.constant_tensor(value)
    usable = tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2
    return value if usable and value is not None and value.producer() is None else None


def _scale_weight(value: ir.Value, scale: float) -> None:
    tensor = value.const_value
    assert tensor is not None

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy() * np.float32(scale), name=tensor.name)

    value.const_value = ir.LazyTensor(
        evaluate, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name
    )


def _scale_eps(new: ir_tools.Additions, add: ir.Node, scale: float) -> None:
    """Give this norm an ε of its own; the others share theirs."""
    eps = ir_tools.scalar(add.inputs[1])
    assert eps is not None
    name = f"{add.name or add.outputs[0].name}.scaled_eps"
    add.replace_input_with(1, new.constant(name, np.float32(eps * scale)))
