"""Linears spelled as convolutions, between which MNN keeps channels packed: for speed, with the same arithmetic."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.mnn.layer_rules import LINEAR_SUFFIX
from sa3_convert.passes import ir_tools

_ELEMENTWISE: Final = frozenset({"Mul", "Sigmoid", "Sin"})


@dataclass(frozen=True)
class _Slot:
    """What a slot for adapters adds to a linear, as `networks.slots` does: σ ⊙ (ρ ⊙ x)·W + (x·A)·B."""

    rho: ir.Value
    """[in]."""
    sigma: ir.Value
    """[out]."""
    inner: ir.Value
    """A [in, rank]."""
    outer: ir.Value
    """B [rank, out]."""


@dataclass(frozen=True)
class _Linear:
    """x·W of [B, N, channels], and + bias if there is one."""

    product: ir.Node
    bias: ir.Value | None
    output: ir.Value
    takes: tuple[ir.Node, ...]
    """What takes x, as its first input."""
    place: ir.Node
    """Before it all is there that it is made of."""
    slot: _Slot | None = None


def keep_channels_packed(model: ir.Model) -> int:
    """Spell linears with nothing but elementwise operators between them as convolutions, in place; return how many.

        y = f(x·W₁)·W₂   →   yᵀ = conv(f(conv(xᵀ, W₁)), W₂)

    MNN computes both in the same way, on channels packed by eights; but what a linear gives it unpacks, and packs again
    for the next, while what a convolution gives stays packed. Nothing is done where a value in between is used
    elsewhere, or where an elementwise operator takes anything but such values and single numbers. Linears with slots
    for adapters are spelled so wherever they stand:

        y = σ ⊙ (ρ ⊙ x)·W + (x·A)·B   →   yᵀ = depthwise(conv(depthwise(xᵀ, ρ), W), σ) + conv(conv(xᵀ, Aᵀ), Bᵀ)

    whose kernels but W are cut from the inputs. A factor of channels is then a pass over packed channels, where it was
    a loop over plain ones, and the branch needs no layout of its own.
    """
    new = ir_tools.Additions(model.graph)
    count = 0
    for alone, node in [(alone, node) for alone in (False, True) for node in model.graph]:
        last = None if node.graph is None else _linear(node.outputs[0])
        firsts, between = ([], []) if last is None or alone else _before(last)
        if last is None or not (firsts or (alone and last.slot is not None)):
            continue
        for value in between:
            _swap(value, new.name(f"{value.name}.packed"))
        for first in firsts:
            x = _transposed(new, first.takes[0].inputs[0], f"{first.output.name}.input")
            packed = _convolved(new, first, x)
            new.insert_before(first.place)
            first.output.replace_all_uses_with(packed)
        name, given = last.output.name, last.takes[0].inputs[0]
        packed = _convolved(new, last, given if firsts else _transposed(new, given, f"{name}.input"))
        plain = _transposed(new, packed, f"{name}.plain")
        plain.shape, plain.type = last.output.shape, last.output.type
        new.insert_before(last.place)
        last.output.replace_all_uses_with(plain, replace_graph_outputs=True)
        ir_tools.remove_unused(model.graph, [linear.output for linear in (*firsts, last)])
        plain.name = name
        count += 1 + len(firsts)
    return count


def _linear(value: ir.Value | None) -> _Linear | None:
    """Return the linear over the last of three axes that gives a value, with its slot if it has one."""
    for base, branch in ir_tools.either_order(ir_tools.produced(value, "Add")):
        if value is not None and (slotted := _slotted(value, base, branch)) is not None:
            return slotted
    bias = None
    product = ir_tools.produced(value, "MatMul")
    for summand, constant in ir_tools.either_order(ir_tools.produced(value, "Add")):
        tensor = ir_tools.constant_tensor(constant)
        if tensor is not None and len(tensor.shape) == 1 and summand is not None and len(summand.uses()) == 1:
            product, bias = ir_tools.produced(summand, "MatMul"), constant
    weight = None if product is None else product.inputs[1]
    tensor = ir_tools.constant_tensor(weight)
    if value is None or product is None or weight is None or tensor is None or weight.producer() is not None:
        return None
    if value.shape is None or len(value.shape) != 3 or len(tensor.shape) != 2 or len(weight.uses()) != 1:
        return None
    if bias is not None and ir_tools.array(bias).shape != (tensor.shape[1],):
        return None
    if bias is None and any(_linear(user.outputs[0]) for user, _ in value.uses() if user.op_type == "Add"):
        return None
    return _Linear(product, bias, value, (product,), product)


def _slotted(value: ir.Value, base: ir.Value | None, branch: ir.Value | None) -> _Linear | None:
    """Return the linear with a slot whose two parts these are."""
    wide, rescaled = ir_tools.produced(branch, "MatMul"), ir_tools.produced(base, "Mul")
    plain = None if rescaled is None else _linear(rescaled.inputs[0])
    scaled = None if plain is None else ir_tools.produced(plain.product.inputs[0], "Mul")
    if wide is None or rescaled is None or plain is None or plain.slot is not None or scaled is None:
        return None
    low, outer, bias = wide.inputs[0], wide.inputs[1], None
    if (padded := ir_tools.produced(low, "Pad")) is not None:
        # A bias is one more row of B, for a one behind the branch's own numbers.
        low, joined = padded.inputs[0], ir_tools.produced(outer, "Concat")
        if joined is None or len(joined.inputs) != 2:
            return None
        outer, bias = joined.inputs
        # A small one was folded into a row, a large one was not.
        row = ir_tools.produced(bias, "Unsqueeze")
        bias = bias if row is None else row.inputs[0]
    narrow, place = ir_tools.produced(low, "MatMul"), value.producer()
    if narrow is None or narrow.inputs[0] is not scaled.inputs[0] or place is None:
        return None
    inside = (base, branch, low, rescaled.inputs[0], scaled.outputs[0], *(() if padded is None else padded.outputs))
    rho, sigma, inner = scaled.inputs[1], rescaled.inputs[1], narrow.inputs[1]
    if any(one is None or one.is_graph_output() or len(one.uses()) != 1 for one in inside):
        return None
    if rho is None or sigma is None or inner is None or outer is None:
        return None
    if [None if one.shape is None else len(one.shape) for one in (rho, sigma, inner, outer)] != [1, 1, 2, 2]:
        return None
    if bias is not None and ir_tools.constant_tensor(bias) is None:
        return None
    return _Linear(plain.product, bias, value, (scaled, narrow), place, _Slot(rho, sigma, inner, outer))


def _before(last: _Linear) -> tuple[list[_Linear], list[ir.Value]]:
    """Return the linears that a linear's input is made of by elementwise operators, and what these give; or nothing."""
    firsts: list[_Linear] = []
    between: list[ir.Value] = []
    users, waiting = {*last.takes}, [last.takes[0].inputs[0]]
    while waiting:
        value = waiting.pop()
        if value in between or any(value is first.output for first in firsts):
            continue
        node = None if value is None else value.producer()
        first = _linear(value)
        if first is not None:
            firsts.append(first)
        elif node is not None and not node.domain and node.op_type in _ELEMENTWISE:
            users.add(node)
            between += node.outputs
            waiting += [used for used in node.inputs if ir_tools.scalar(used) is None]
        elif (split := ir_tools.produced(value, "Split")) and ir_tools.attribute_int(split, "axis", 0) in (-1, 2):
            users.add(split)
            between += split.outputs
            waiting.append(split.inputs[0])
        else:
            return [], []
    inner = [*between, *(first.output for first in firsts)]
    is_closed = all(user in users for value in inner for user, _ in value.uses())
    is_known = all(value.shape is not None and len(value.shape) == 3 for value in inner)
    return (firsts, between) if is_closed and is_known and not any(v.is_graph_output() for v in inner) else ([], [])


def _swap(value: ir.Value, name: str) -> None:
    """Give a value between linears its channels first, and a name that says so."""
    assert value.shape is not None
    batch, length, channels = value.shape
    value.shape, value.name = ir.Shape([batch, channels, length]), name
    if (split := ir_tools.produced(value, "Split")) is not None:
        split.attributes["axis"] = ir.AttrInt64("axis", 1)


def _transposed(new: ir_tools.Additions, value: ir.Value | None, name: str) -> ir.Value:
    node = ir.node("Transpose", [value], {"perm": [0, 2, 1]}, name=new.name(name))
    node.outputs[0].name = node.name
    new.nodes.append(node)
    return node.outputs[0]


def _convolved(new: ir_tools.Additions, linear: _Linear, x: ir.Value | None) -> ir.Value:
    """Return what convolutions do in place of a linear, that with W under the name that MNN gave the linear."""
    weight, slot = linear.product.inputs[1], linear.slot
    tensor = ir_tools.constant_tensor(weight)
    assert weight is not None
    assert tensor is not None

    def transposed() -> NDArray[Any]:
        kernel = np.array(tensor.numpy().T, order="C")[..., np.newaxis]
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()  # what was mapped would stay resident
        return kernel

    value = new.lazy(f"{weight.name}.kernel", transposed, tensor.dtype, [*tensor.shape.numpy()[::-1], 1])
    bias = [] if linear.bias is None else [linear.bias]
    if slot is None:
        return new.node("Conv", [x, value, *bias], f"{linear.output.name}{LINEAR_SUFFIX}")
    name = linear.product.outputs[0].name
    fan_out, fan_in = map(int, value.const_value.shape.numpy()[:2])  # type: ignore[union-attr]
    scaled = _factored(new, x, slot.rho, fan_in, f"{name}.scaled")
    product = new.node("Conv", [scaled, value], f"{name}{LINEAR_SUFFIX}")
    rescaled = _factored(new, product, slot.sigma, fan_out, f"{name}.rescaled")
    narrow = new.node("Conv", [x, _kernel(new, slot.inner, f"{name}.inner")], f"{name}.narrow")
    row = [] if linear.bias is None else [new.constant(f"{name}.bias", ir_tools.array(linear.bias).reshape(-1))]
    wide = new.node("Conv", [narrow, _kernel(new, slot.outer, f"{name}.outer"), *row], f"{name}.wide")
    return new.node("Add", [rescaled, wide], f"{name}.adapted")


def _factored(
    new: ir_tools.Additions, x: ir.Value | None, factor: ir.Value | None, channels: int, name: str
) -> ir.Value:
    """Return channels times a factor [channels] of each."""
    shape = new.constant(f"{name}.shape", np.array([channels, 1, 1], np.int64))
    kernel = new.node("Reshape", [factor, shape], f"{name}.kernel", shape=[channels, 1, 1])
    return new.node("Conv", [x, kernel], name, group=channels)


def _kernel(new: ir_tools.Additions, matrix: ir.Value | None, name: str) -> ir.Value:
    """Return the kernel of a convolution that multiplies with a matrix [in, out]."""
    turned = ir.node("Transpose", [matrix], {"perm": [1, 0]}, name=new.name(f"{name}.turned"))
    turned.outputs[0].name = turned.name
    new.nodes.append(turned)
    axis = new.constant(f"{name}.axis", np.array([2], np.int64))
    return new.node("Unsqueeze", [turned.outputs[0], axis], f"{name}.kernel")
