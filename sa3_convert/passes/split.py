"""A graph in two: what stays the same while some inputs change, and the rest.

    out = f(x, c)   →   s = prepare(c),  out = step(x, c, s)

Handed over are values that only unchanging inputs decide, that a changing one meets, and that cost something: at least
one product with constant weights stands behind each. In the DiT, whose x and t change with every denoising step, these
are keys and values of all cross-attentions, the local conditioning of all blocks, and the global conditioning. Cheap
values, such as rotary tables and masks, are computed again rather than handed over; for these the step keeps the inputs
that they need.
"""

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from sa3_convert.errors import ConversionError
from sa3_convert.passes import ir_tools
from sa3_convert.passes.pipeline import load_onnx, save_onnx
from sa3_convert.recipe import ComponentRecipe

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})


def split_onnx(source: Path, prepare: Path, step: Path, changing: Collection[str]) -> tuple[str, ...]:
    """Write the two parts of an ONNX file, each with its own weights in `<name>.data`.

    Args:
        source: the whole; not changed.
        prepare: takes the inputs that its outputs need, gives the values that are handed over.
        step: takes those and the inputs that it needs itself, gives the outputs of the whole.
        changing: names of the inputs that change.

    Returns:
        The names of the values that are handed over.

    Raises:
        ModelFileError: the source is missing or damaged.
        ConversionError: nothing costly is decided by unchanging inputs alone, or a part cannot be written.

    """
    values = _handed_over(load_onnx(source).graph, changing)
    if not values:
        raise ConversionError(f"{source.name}: everything in it depends on {', '.join(changing)}; it cannot be split.")
    if unknown := [value.name for value in values if value.type is None or value.shape is None]:
        raise ConversionError(f"{source.name} does not say what shape {unknown[0]!r} has; run shape inference on it.")
    names = tuple(str(value.name) for value in values)
    save_onnx(_prepare(load_onnx(source), names), prepare)
    save_onnx(_step(load_onnx(source), names), step)
    return names


def rules_of_part(recipe: ComponentRecipe, part: Path) -> ComponentRecipe:
    """Return the recipe without rules for layers that the ONNX file of a part does not have."""
    scheme = recipe.weights
    if scheme is None or not scheme.layers:
        return recipe
    names = list(_by_name(load_onnx(part).graph))
    rules = tuple(rule for rule in scheme.layers if any(rule.matches(name) for name in names))
    return recipe.model_copy(update={"weights": scheme.model_copy(update={"layers": rules})})


def _handed_over(graph: ir.Graph, changing: Collection[str]) -> list[ir.Value]:
    fixed = {value for value in graph.inputs if value.name not in changing}
    moving = {value for value in graph.inputs if value.name in changing}
    costly: set[ir.Value] = set()
    found: list[ir.Value] = []
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if any(value in moving for value in inputs):
            moving.update(node.outputs)
            found += [value for value in inputs if value in costly and value not in found]
        elif any(value in fixed for value in inputs):
            fixed.update(node.outputs)
            is_product = node.op_type in _PRODUCTS and any(ir_tools.constant_tensor(v) is not None for v in inputs)
            if is_product or any(value in costly for value in inputs):
                costly.update(node.outputs)
    return found


def _prepare(model: ir.Model, names: Collection[str]) -> ir.Model:
    values = _by_name(model.graph)
    model.graph.outputs[:] = [values[name] for name in names]
    return _trimmed(model)


def _step(model: ir.Model, names: Collection[str]) -> ir.Model:
    values = _by_name(model.graph)
    for name in names:
        value = values[name]
        taken = ir.Value(name=name, shape=value.shape, type=value.type)
        value.name = f"{name}.prepared"
        value.replace_all_uses_with(taken)
        model.graph.inputs.append(taken)
    return _trimmed(model)


def _trimmed(model: ir.Model) -> ir.Model:
    """Take out what no output needs: nodes, weights, inputs."""
    common.RemoveUnusedNodesPass()(model)
    unused = [value for value in model.graph.inputs if not value.uses()]
    for value in unused:
        model.graph.inputs.remove(value)
    return model


def _by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    return {value.name: value for node in graph for value in node.outputs if value.name is not None}
