"""A graph in two: what stays the same while some inputs change, and the rest.

    out = f(x, c)   →   s = prepare(c),  out = step(x, c, s)

Handed over are values that only unchanging inputs decide, that a changing one meets, and that cost something: at least
one product with constant weights stands behind each. In the DiT, whose x and t change with every denoising step, these
are keys and values of all cross-attentions, the local conditioning of all blocks, and the global conditioning. Cheap
values, such as rotary tables and masks, are computed again rather than handed over; for these the step keeps the inputs
that they need.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import onnx_ir as ir

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
    model = load_onnx(source)
    values = _handed_over(model.graph, changing)
    if not values:
        raise ConversionError(f"{source.name}: everything in it depends on {', '.join(changing)}; it cannot be split.")
    if unknown := [value.name for value in values if value.type is None or value.shape is None]:
        raise ConversionError(f"{source.name} does not say what shape {unknown[0]!r} has; run shape inference on it.")
    save_onnx(_part(model, model.graph.inputs, values), prepare)
    save_onnx(_part(model, [*model.graph.inputs, *values], model.graph.outputs), step)
    return tuple(str(value.name) for value in values)


def rules_of_part(recipe: ComponentRecipe, part: Path) -> ComponentRecipe:
    """Return the recipe without rules for layers that the ONNX file of a part does not have."""
    scheme = recipe.weights
    if scheme is None or not scheme.layers:
        return recipe
    names = [value.name for node in load_onnx(part).graph for value in node.outputs if value.name]
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


def _part(model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
    """Copy what lies between values, weights left where they are; of the inputs those stay that it needs."""
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]
    # `extract` collects the weights in a set; their order decides the bytes.
    own = dict(graph.initializers)
    graph.initializers.clear()
    graph.initializers.update({name: own[name] for name in model.graph.initializers if name in own})
    name, version = model.producer_name, model.producer_version
    return ir.Model(graph, ir_version=model.ir_version, producer_name=name, producer_version=version)
