"""Bring torch's graph into the form that converters and readers want, with readable names; it computes the same."""

import ast
from collections.abc import Set

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxscript import optimizer

_WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_WEIGHT_SUFFIXES = (".weight", ".weight.transposed")
_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""What torch notes for the lengths that it reads off the inputs."""


def give_readable_names(model: ir.Model, parameters: Set[str]) -> None:
    """Rename nodes, intermediate values and anonymous constants in place.

    Inputs, outputs and `parameters` keep their names. Where a module has several operators of a type, the second is
    called `….mul_2`, and so on in graph order; the second output of a Split is `….split.1`.
    """
    graph = model.graph
    fixed = {value.name for value in [*graph.inputs, *graph.outputs] if value.name}
    named = {name for name in graph.initializers if name.removesuffix(".transposed") in parameters}
    names = _Names(fixed | named)
    for node in graph:
        operator = f"{_scope(node)}.{node.op_type.lower()}".removeprefix(".")
        node.name = names.unused(_layer(node) or operator)
        for index, value in enumerate(node.outputs):
            if value.name not in fixed:
                value.name = node.name if index == 0 else names.unused(f"{node.name}.{index}")
    for name, value in list(graph.initializers.items()):
        if name not in named:
            value.name = names.unused("constant")


class _Names:
    """Hands out names that are not taken yet."""

    def __init__(self, taken: Set[str]) -> None:
        self._taken = set(taken)
        self._numbers: dict[str, int] = {}

    def unused(self, wanted: str) -> str:
        name = wanted
        while name in self._taken:
            self._numbers[wanted] = self._numbers.get(wanted, 1) + 1
            name = f"{wanted}_{self._numbers[wanted]}"
        self._taken.add(name)
        return name


def _layer(node: ir.Node) -> str | None:
    """Return the module path of the weight that a linear or convolution takes."""
    if node.op_type not in _WEIGHTED:
        return None
    weight = node.inputs[1]
    assert weight is not None
    assert weight.name is not None
    if not weight.is_initializer() or not weight.name.endswith(_WEIGHT_SUFFIXES):
        return None
    return weight.name.removesuffix(".transposed").removesuffix(".weight")


def _scope(node: ir.Node) -> str:
    """Return the path of the module that a node belongs to; what a rewrite put in belongs where its result is used."""
    pending, seen = [node], {node}
    while pending:
        candidate = pending.pop(0)
        if noted := candidate.metadata_props.get(_SCOPES):
            # The last scope is the operation itself.
            scope = str(["", *ast.literal_eval(noted)[:-1]][-1])
            return "" if scope == _NO_MODULE else scope
        users = [user for value in candidate.outputs for user, _ in value.uses()]
        pending += [user for user in users if user not in seen]
        seen.update(users)
    return ""


_SMALL = 1024
"""Elements up to which constants are folded and shared."""

_INT32 = np.iinfo(np.int32)


def simplify(model: ir.Model, parameters: Set[str]) -> None:
    """Simplify a freshly traced model in place; `parameters` keep their names. No weight is copied."""
    transpose_weights(model)
    _fold(model)
    fix_reshapes(model)
    remove_no_ops(model)
    clamp_integers(model)
    _fold(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    share_constants(model, parameters)
    _remove_repetition(model)
    # What torch did not note: types and shapes of the operators that one of its own became.
    common.ShapeInferencePass()(model)


def _fold(model: ir.Model) -> None:
    # Shape inference stays off: it is the slow part, and torch has written every shape already.
    optimizer.fold_constants(model, onnx_shape_inference=False, input_size_limit=_SMALL, output_size_limit=_SMALL)
    _remove_repetition(model)


def _remove_repetition(model: ir.Model) -> None:
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        tidy(model)


def transpose_weights(model: ir.Model) -> int:
    """Replace Transpose(parameter) by a transposed view of the parameter; return the number of parameters.

    The view takes the parameter's name; where something else uses the parameter as it is, that one keeps the name and
    the view's ends in `.transposed`. Nothing is done for a Transpose of anything but two axes.
    """
    graph, count = model.graph, 0
    for name, parameter in list(graph.initializers.items()):
        transposes = [
            node
            for node, _ in parameter.uses()
            if node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]
        ]
        if not transposes or parameter.const_value is None:
            continue
        view = _constant(parameter.const_value.numpy().T, f"{name}.transposed")
        for node in transposes:
            node.outputs[0].replace_all_uses_with(view)
            graph.remove(node, safe=True)
        if not parameter.uses():
            del graph.initializers[name]
            view.name = name
        graph.register_initializer(view)
        count += 1
    return count


def fix_reshapes(model: ir.Model) -> int:
    """Replace the computed shape of Reshape by a constant one; return the number of replacements.

    torch computes a shape from Shape, Gather and Concat for every view; the shapes that it noted say the same.
    One free dimension becomes -1; others are allowed where input and output agree (0, "as in the input"). Nothing is
    done where more are free.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "Reshape" or node.inputs[1] is None:
            continue
        if ir.convenience.get_const_tensor(node.inputs[1]) is None:
            shape = _constant_shape(node.inputs[0], node.outputs[0])
            if shape is None:
                continue
            target = _constant(np.array(shape, np.int64), f"{node.outputs[0].name}.shape")
            model.graph.register_initializer(target)
            node.replace_input_with(1, target)
            count += 1
        # No tensor here is empty, so 0 never means 0; converters know the default best.
        node.attributes.pop("allowzero", None)
    return count


def _constant_shape(source: ir.Value | None, result: ir.Value) -> list[int] | None:
    if source is None or source.shape is None or result.shape is None:
        return None
    shape: list[int] = []
    for axis, dim in enumerate(result.shape):
        if isinstance(dim, int):
            shape.append(dim)
        elif dim.value is not None and axis < len(source.shape) and source.shape[axis] == dim:
            shape.append(0)
        else:
            shape.append(-1)
    return shape if shape.count(-1) <= 1 else None


def remove_no_ops(model: ir.Model) -> int:
    """Remove Slices that take everything, Expands to the shape of their input, and Reshapes there and back.

    Returns the number removed. Nothing is done where a Slice's bound is computed or an Expand's dimension is free.
    """
    graph, count = model.graph, 0
    for node in list(graph):
        source = _unchanged_source(node)
        if source is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(source)
            graph.remove(node, safe=True)
            count += 1
    return count


def _unchanged_source(node: ir.Node) -> ir.Value | None:
    """Return the value that a node only repeats, if it does."""
    source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
    if source is None or result.shape is None:
        return None
    if node.op_type == "Slice":
        return source if _takes_everything(node) else None
    if node.op_type == "Expand":
        return source if source.shape == result.shape and result.shape.is_static() else None
    if node.op_type == "Reshape":
        before = source.producer()
        if before is not None and before.op_type == "Reshape" and before.inputs[0] is not None:
            source = before.inputs[0]
        return source if source.shape == result.shape else None
    return None


def _takes_everything(node: ir.Node) -> bool:
    constants = [None if v is None else ir.convenience.get_const_tensor(v) for v in node.inputs[1:]]
    if len(constants) != 4 or any(constant is None for constant in constants):
        return False
    starts, ends, _, steps = (constant.numpy() for constant in constants if constant is not None)
    return bool((starts == 0).all() and (ends >= _INT32.max).all() and (steps == 1).all())


def clamp_integers(model: ir.Model) -> int:
    """Bring integer constants into 32 bits; return the number of constants changed.

    torch writes "to the end" as 2⁶³−1 in Slice; 2³¹−1 means the same for any tensor, and MNN's integers have 32 bits.
    """
    count = 0
    for node in list(model.graph):
        for index, value in enumerate(node.inputs if node.op_type == "Slice" else ()):
            tensor = None if value is None else ir.convenience.get_const_tensor(value)
            if index == 0 or tensor is None:
                continue
            array = tensor.numpy()
            clamped = array.clip(_INT32.min, _INT32.max)
            if not np.array_equal(array, clamped):
                replacement = _constant(clamped, f"{node.outputs[0].name}.limit{index}")
                model.graph.register_initializer(replacement)
                node.replace_input_with(index, replacement)
                count += 1
    return count


def share_constants(model: ir.Model, parameters: Set[str]) -> int:
    """Keep one of several equal small constants; return the number removed. Parameters stay, equal or not."""
    graph, count = model.graph, 0
    kept: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if name in parameters or tensor is None or tensor.size > _SMALL:
            continue
        array = tensor.numpy()
        first = kept.setdefault((str(tensor.dtype), array.shape, array.tobytes()), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[name]
            count += 1
    return count


def _constant(array: NDArray[np.generic], name: str) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
