"""A graph in parts: what some inputs alone decide, a part for each group of them, and the rest.

    out = f(x, t, c)   →   s = prepare(c),  e = time(t),  out = step(x, c, s, e)

Handed over are values that only a group's inputs decide, that another input meets, and that cost something: at least
one product with constant weights stands behind each. In the DiT, whose x and t change with every denoising step, these
are of c keys and values of all cross-attentions, the local conditioning of all blocks, and the global conditioning; of
t its embedding, whose phases half arithmetic would lose. Cheap values, such as rotary tables and masks, are computed
again rather than handed over; for these the last part keeps the inputs that they need.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from sa3_convert.components import Component, part_files
from sa3_convert.errors import ConversionError
from sa3_convert.passes import ir_tools
from sa3_convert.passes.pipeline import opened_onnx, save_onnx
from sa3_convert.recipe import ComponentRecipe

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "MatMulIntegerToFloat"})


def split_onnx(source: Path, parts: Mapping[Path, Collection[str]], rest: Path) -> tuple[str, ...]:
    """Write the parts of an ONNX file, each with its own weights in `<name>.data`.

    Args:
        source: the whole; not changed.
        parts: files for the parts that need some inputs alone, with the names of these; they give what is handed over.
        rest: takes that and the inputs that it needs itself, gives the outputs of the whole.

    Returns:
        The names of the values that are handed over.

    Raises:
        ModelFileError: the source is missing or damaged.
        ConversionError: nothing costly is decided by the inputs of a part alone, or a part cannot be written.

    """
    handed: tuple[str, ...] = ()
    with opened_onnx(source) as model:
        for path, part in zip((*parts, rest), _parts(model, parts.values(), source.name), strict=True):
            save_onnx(part, path)
            if path != rest:
                handed += tuple(str(value.name) for value in part.graph.outputs)
    return handed


def write_parts(whole: Path, component: Component) -> list[Path]:
    """Write the graphs that compute a component's ONNX file in parts beside it, over its weights; none if it has none.

    In turn they give bit for bit what the whole does.

    Raises:
        ModelFileError: the whole is missing or damaged.
        ConversionError: it cannot be split.

    """
    with opened_onnx(whole) as model:
        parts = _parts_of(model, whole, component)
        for path, part in parts.items():
            ir.save(part, path, format="protobuf")
    return [*parts]


def check_parts(whole: Path, component: Component, parts: Sequence[Path]) -> None:
    """Hold files to what `write_parts` makes of the whole, bit for bit; ConversionError if one is something else."""
    with opened_onnx(whole) as model:
        for path, wanted in zip(parts, _parts_of(model, whole, component).values(), strict=True):
            with opened_onnx(path) as found:
                ir_tools.require_same(found, wanted)


def _parts_of(model: ir.Model, whole: Path, component: Component) -> dict[Path, ir.Model]:
    files = part_files(component, whole.name)
    groups = [*files.values()][:-1]
    return {whole.with_name(name): part for name, part in zip(files, _parts(model, groups, whole.name), strict=False)}


def _parts(model: ir.Model, groups: Iterable[Collection[str]], name: str) -> Iterator[ir.Model]:
    """Yield a part for each group of inputs, and the rest."""
    inputs, handed = list(model.graph.inputs), list[ir.Value]()
    for names in groups:
        values = _handed_over(model.graph, names)
        if not values:
            raise ConversionError(f"{name}: {', '.join(names)} decide nothing alone; it cannot be split.")
        if unknown := [value.name for value in values if value.type is None or value.shape is None]:
            raise ConversionError(f"{name} does not say what shape {unknown[0]!r} has; run shape inference on it.")
        yield _part(model, inputs, values)
        handed += values
    yield _part(model, [*inputs, *handed], model.graph.outputs)


def rules_of_part(recipe: ComponentRecipe, part: Path) -> ComponentRecipe:
    """Return the recipe without rules for layers that the ONNX file of a part does not have."""
    scheme = recipe.weights
    if scheme is None or not scheme.layers:
        return recipe
    with opened_onnx(part) as model:
        names = [value.name for node in model.graph for value in node.outputs if value.name]
    rules = tuple(rule for rule in scheme.layers if any(rule.matches(name) for name in names))
    return recipe.model_copy(update={"weights": scheme.model_copy(update={"layers": rules})})


def _handed_over(graph: ir.Graph, names: Collection[str]) -> list[ir.Value]:
    fixed = {value for value in graph.inputs if value.name in names}
    moving = {value for value in graph.inputs if value.name not in names}
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
