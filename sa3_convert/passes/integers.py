"""Matrix products that ONNX Runtime computes with 8-bit integers: weights stored, activations as they come.

    y = x · W = (x · H) · (H · W)    →    y ≈ (code(x · H / t) · code(H · W / s)) · s · t

H is a Hadamard matrix for every 64 neighbouring channels, H · H = 1: an outlier among them is spread evenly over all.
t = max |x · H| / 127 is a token's scale, so that one loud token, or one of padding, does not take the levels of all
others; s = max |H · W| / 127 an output channel's. Products of the same activation share its codes.

What is quantised are the products with constant weights: nearly all arithmetic of a Stable Audio 3 model. What stays
float: products of activations, convolutions (ONNX Runtime's integer ones are slower), token tables, and `Gemm`, which
the exports use for single vectors only (time and duration after their Fourier features; nothing to gain, and their
error reaches every latent).

Activations are unsigned around 128, because ONNX Runtime's fast x86 kernels (AMX, VNNI) take unsigned times signed.
Weights have all eight bits: seven cost 3 to 4 dB and save no time. On x86 without VNNI those kernels would add two
products in 16 bits and saturate; `ort.OrtSession` finds that out and lets ONNX Runtime take exact ones. Whoever runs
such a model otherwise has to set `session.x64quantprecision` there.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.passes import ir_tools

FLOORS_DB: Final[Mapping[Component, float]] = {
    Component.TEXT_ENCODER: 28,
    # Nothing of it is quantised.
    Component.NUMBER_CONDITIONER: 100,
    Component.DIT: 26,
    Component.DECODER: 36,
    Component.ENCODER: 27,
}
"""Least signal-to-noise ratio in dB of a model that `compute_in_integers` made, against its reference: two to four
below what true-size weights with heavy tails keep, and of the autoencoder the miniature's, which are not random."""

KEPT: Final[Mapping[Component, str]] = {
    Component.TEXT_ENCODER: r"^layers\.[01]\.",
    Component.DIT: r"^transformer\.project_(in|out)$",
}
"""Products that stay float, by the names of their results, searched for. Everything passes through them: two of twelve
layers of the text encoder make two thirds of its error (27.3 dB with them, 31.6 without), and it runs once per
generation; the first and last product of the DiT make a tenth of its error and a thousandth of its work."""

_TOP: Final = 127
_ZERO: Final = 128
_LEAST: Final = 1e-30
"""What a token of zeros is divided by."""
_NORM: Final = "SimplifiedLayerNormalization"
"""ONNX Runtime's own, in the standard domain."""
_CONTRIB: Final = "com.microsoft"
_PRODUCT: Final = "MatMulIntegerToFloat"
_OPSET: Final = 21
"""The first in which QuantizeLinear takes a scale per block."""
_BLOCKS: Final = (64, 16, 4)
_ENDS: Final = ("Min", "Max")


def compute_in_integers(model: ir.Model, component: Component | None = None) -> int:
    """Let every product with a constant matrix compute with integers, in place; return how many do.

    Weights are quantised when the model is saved, one at a time. Of a component, what is `KEPT` stays float.
    """
    graph = model.graph
    kept = re.compile(KEPT.get(component, r"(?!)") if component else r"(?!)")
    nodes = [node for node in graph if _factors(node) and not kept.search(node.outputs[0].name or "")]
    if not nodes:
        return 0
    _fuse_norms(graph)
    products = [(node, *factors) for node in nodes for factors in _factors(node)]
    new = ir_tools.Additions(graph)
    model.opset_imports.update({"": max(_OPSET, model.opset_imports.get("", 0)), _CONTRIB: 1})
    constants = _Constants(new)
    activations: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    weights: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node, x, weight, tensor in products:
        if x not in activations:
            activations[x] = _quantised(new, x, tensor.shape.numpy()[0], constants)
            new.insert_before(node)
        if weight not in weights:
            weights[weight] = _stored(new, str(weight.name), tensor)
        (codes, tokens), (stored, scales) = activations[x], weights[weight]
        last, factor = _scaled(node)
        result = last.outputs[0]
        if factor is not None:
            scales = new.node("Mul", [scales, factor], f"{result.name}.scales", shape=factor.shape)
        inputs = [codes, stored, constants.one, scales, constants.zero]
        scaled = ir.val(new.name(f"{result.name}.product"), result.dtype, result.shape)
        new.nodes.append(ir.node(_PRODUCT, inputs, domain=_CONTRIB, outputs=[scaled], name=scaled.name))
        # Without a name: it takes that of the result that it replaces.
        back = ir.node("Mul", [scaled, tokens], outputs=[ir.val(None, result.dtype, result.shape)], name=node.name)
        new.insert_before(last)
        ir.convenience.replace_nodes_and_values(graph, last, [last], [back], [result], back.outputs)
        ir_tools.remove_unused(graph, [weight] if last is node else [node.outputs[0]])
    return len(products)


def _scaled(product: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """Return what alone multiplies a product's results by a computed factor for each output, and that; else itself.

    The factor is taken into the scales, where it costs no pass over the results.
    """
    result = product.outputs[0]
    user = next((user for user, _ in result.uses()), None)
    if len(result.uses()) == 1 and user is not None and user.op_type == "Mul" and not result.is_graph_output():
        for one, factor in ir_tools.either_order(user):
            if one is result and factor is not None and factor.producer() and len(factor.shape or ()) == 1:
                return user, factor
    return product, None


def _factors(node: ir.Node) -> list[tuple[ir.Value, ir.Value, ir.TensorProtocol]]:
    """Return a product's activation and constant matrix, as value and as tensor; none of other nodes.

    A matrix with one row makes an outer product, as phases are: there is no sum to compute with integers.
    """
    if node.op_type != "MatMul" or node.domain:
        return []
    x, weight = node.inputs
    tensor = ir_tools.constant_tensor(weight)
    if x is None or weight is None or tensor is None or tensor.dtype is not ir.DataType.FLOAT or len(tensor.shape) != 2:
        return []
    return [(x, weight, tensor)] if tensor.shape.numpy()[0] > 1 else []


def _fuse_norms(graph: ir.Graph) -> None:
    """Let one operator compute x / sqrt(mean(x²) + ε) · γ, in place of passes over the activation for each step."""
    for node in list(graph):
        found = next(_norms(node), None)
        if found is not None:
            x, gamma, eps, spelled = found
            result = node.outputs[0]
            attributes = {"axis": -1, "epsilon": eps, "stash_type": 1}
            fused = ir.node(
                _NORM, [x, gamma], attributes, outputs=[ir.val(None, result.dtype, result.shape)], name=node.name
            )
            ir.convenience.replace_nodes_and_values(graph, node, [node], [fused], [result], fused.outputs)
            ir_tools.remove_unused(graph, spelled)


def _norms(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value, float, list[ir.Value | None]]]:
    """Yield x, γ, ε and what is left over, where a node is the last multiplication of an RMS norm."""
    for even, gamma in ir_tools.either_order(node if node.op_type == "Mul" and not node.domain else None):
        shape = ir_tools.constant_tensor(gamma)
        if gamma is None or even is None or shape is None or len(shape.shape) != 1 or len(even.uses()) != 1:
            continue
        for x, factor in ir_tools.either_order(ir_tools.produced(even, "Mul")):
            reciprocal = ir_tools.produced(factor, "Reciprocal")
            add = None if x is None else ir_tools.rms_eps(reciprocal, x)
            eps = None if add is None else ir_tools.scalar(add.inputs[1])
            if x is not None and eps is not None:
                yield x, gamma, eps, [even, factor]


class _Constants:
    """What all products of a graph share."""

    def __init__(self, new: ir_tools.Additions) -> None:
        self.last = new.constant("integers.last_axis", np.array([-1], np.int64))
        self.least = new.constant("integers.least", np.float32(_LEAST))
        self.step = new.constant("integers.step", np.float32(1 / _TOP))
        self.one = new.constant("integers.one", np.float32(1))
        self.zero = new.constant("integers.zero", np.uint8(_ZERO))


def _block(width: int) -> int:
    """Return how many of so many channels are mixed: a power of four, so that the factor of H is one of two."""
    return next((size for size in _BLOCKS if width % size == 0), 1)


def _rotated(new: ir_tools.Additions, x: ir.Value, size: int) -> ir.Value:
    """Return x · H."""
    if size == 1:
        return x
    rows = new.node("Reshape", [x, new.constant(f"{x.name}.rows", np.array([-1, size]))], f"{x.name}.blocks")
    mixing = new.constant(f"{x.name}.hadamard", _mixed(np.eye(size, dtype=np.float32)))
    mixed = new.node("MatMul", [rows, mixing], f"{x.name}.mixed")
    shape = new.node("Shape", [x], f"{x.name}.shape", ir.DataType.INT64)
    return new.node("Reshape", [mixed, shape], f"{x.name}.rotated", shape=x.shape)


def _mixed(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return H · W for W [in, out], by sums and differences in an order that is the same on every machine."""
    inner, outer = weight.shape
    size = _block(inner)
    result = np.array(weight, order="C")
    for block in result.reshape(inner // size, size * outer):
        half = outer
        while half < block.size:
            pairs = block.reshape(-1, 2, half)
            sums = pairs[:, 0] + pairs[:, 1]
            np.subtract(pairs[:, 0], pairs[:, 1], out=pairs[:, 1])
            pairs[:, 0] = sums
            half *= 2
    result *= np.float32(1 / math.sqrt(size))
    return result


def _quantised(new: ir_tools.Additions, x: ir.Value, width: int, constants: _Constants) -> tuple[ir.Value, ir.Value]:
    """Return an activation's codes, and their scale per token, [..., 1].

    Both extremes instead of the magnitudes, and one block per token in QuantizeLinear: no pass over the activation
    writes floats.
    """
    x = _rotated(new, x, _block(width))
    low, high = (new.node(f"Reduce{end}", [x, constants.last], f"{x.name}.{end.lower()}", keepdims=1) for end in _ENDS)
    largest = new.node("Max", [high, new.node("Neg", [low], f"{x.name}.depth"), constants.least], f"{x.name}.largest")
    scale = new.node("Mul", [largest, constants.step], f"{x.name}.scale")
    shape = new.node("Shape", [scale], f"{x.name}.tokens", ir.DataType.INT64)
    zeros = new.node("Expand", [constants.zero, shape], f"{x.name}.zeros", ir.DataType.UINT8)
    levels = [x, scale, zeros]
    byte = ir.DataType.UINT8
    return new.node("QuantizeLinear", levels, f"{x.name}.codes", byte, x.shape, axis=-1, block_size=width), scale


def _stored(new: ir_tools.Additions, name: str, tensor: ir.TensorProtocol) -> tuple[ir.Value, ir.Value]:
    """Register a weight's codes [in, out] and scales [out], which are computed when they are written."""
    inner, outer = tensor.shape.numpy()

    @cache
    def scales() -> NDArray[Any]:
        largest = np.abs(_mixed(tensor.numpy())).max(axis=0)
        # Of a channel of zeros, any will do.
        return np.where(largest > 0, np.maximum(largest / np.float32(_TOP), np.finfo(np.float32).tiny), np.float32(1))

    def codes() -> NDArray[Any]:
        rounded: NDArray[np.int8] = np.rint(_mixed(tensor.numpy()) / scales()).astype(np.int8)
        return rounded

    return (
        new.lazy(f"{name}.codes", codes, ir.DataType.INT8, (inner, outer)),
        new.lazy(f"{name}.scales", scales, ir.DataType.FLOAT, (outer,)),
    )


def check_integers(model: ir.Model, reference: ir.Model, component: Component | None = None) -> int:
    """Hold a saved model to what `compute_in_integers` makes of its reference, bit for bit.

    Args:
        model: what was written.
        reference: what it was made of; rewritten in place.
        component: what it computes.

    Returns:
        The number of integer products.

    Raises:
        ConversionError: it is something else.

    """
    count = compute_in_integers(reference, component)
    found = sum(node.op_type == _PRODUCT for node in model.graph)
    if found != count:
        raise ConversionError(f"It has {found} integer products; its reference has {count} to make them of.")
    ir_tools.require_same(model, reference)
    return count
