"""Readable names in an exported graph: they appear in recipes' layer rules, in audits, reports and bisections.

A linear or convolution is called after its parameter (`transformer.layers.3.self_attn.to_qkv` for the weight
`transformer.layers.3.self_attn.to_qkv.weight`), and so is its output, because MNN names a layer after the output.
Everything else is called after the module that computes it and the operator: `transformer.layers.3.pre_norm.mul`.
"""

import ast
from collections.abc import Set

import onnx_ir as ir

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
