"""What several passes need to read and edit a graph: its constants, and taking out what nothing uses any more."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.errors import ConversionError

_PIECE: Final = 1 << 24


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initialiser or Constant node, or None.

    An initialiser that is a graph input too can be overridden by the caller, so it is not constant.
    """
    if value is None or value.is_graph_input():
        return None
    return ir.convenience.get_const_tensor(value)


def array(value: ir.Value) -> NDArray[np.generic]:
    """Return the array of a value known to be constant (a view of the file where it is memory-mapped)."""
    tensor = constant_tensor(value)
    assert tensor is not None, f"{value.name} is not constant"
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """Return the number that a constant of one element holds, or None."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    return float(tensor.numpy().reshape(()).item())


def depends_on_inputs(graph: ir.Graph, *, by_content: bool = False) -> set[ir.Value]:
    """Return the values that are computed from a graph input; with `by_content`, not from its shape alone."""
    found = set(graph.inputs)
    for node in graph:
        if by_content and node.op_type in ("Shape", "Size"):
            continue
        if any(value in found for value in node.inputs if value is not None):
            found.update(node.outputs)
    return found


class Additions:
    """New constants and nodes of a graph, each under the wanted name or that with the first number that is free."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        """What `insert_before` will put into the graph."""
        values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
        self._taken = {value.name for value in values}

    def name(self, wanted: str) -> str:
        """Return a name that no value has, and keep it from being given again."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def constant(self, name: str, array: NDArray[np.generic] | np.generic) -> ir.Value:
        """Register a new initialiser."""
        return self._registered(ir.tensor(np.asarray(array), name=self.name(name)))

    def lazy(
        self, name: str, compute: Callable[[], NDArray[Any]], dtype: ir.DataType, shape: Sequence[int]
    ) -> ir.Value:
        """Register a new initialiser that is computed when it is written."""
        wanted = self.name(name)
        tensor = ir.LazyTensor(
            lambda: ir.Tensor(compute(), name=wanted), dtype=dtype, shape=ir.Shape(shape), name=wanted
        )
        return self._registered(tensor)

    def _registered(self, data: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(data.shape.numpy())
        value = ir.Value(name=data.name, shape=shape, type=ir.TensorType(data.dtype), const_value=data)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
        shape: ir.Shape | Sequence[int] | None = None,
        **attributes: int,
    ) -> ir.Value:
        """Return the output of a new node."""
        output = ir.val(self.name(name), dtype, shape)
        self.nodes.append(ir.node(operator, inputs, attributes, outputs=[output], name=output.name))
        return output

    def insert_before(self, node: ir.Node) -> None:
        """Put the new nodes into the graph."""
        self.graph.insert_before(node, self.nodes)
        self.nodes = []


def attribute_int(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def produced(value: ir.Value | None, operator: str) -> ir.Node | None:
    """Return the node that makes a value, if it is this standard operator."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator and not node.domain else None


def either_order(node: ir.Node | None) -> Iterator[tuple[ir.Value | None, ir.Value | None]]:
    """Yield the two inputs of a commutative node, as they are and exchanged; nothing for None."""
    if node is not None:
        first, second = node.inputs
        yield first, second
        yield second, first


def rms_eps(reciprocal: ir.Node | None, source: ir.Value) -> ir.Node | None:
    """Return the Add of ε in 1 / Sqrt(ReduceMean(source²) + ε), what an RMS norm multiplies `source` with, or None."""
    root = None if reciprocal is None else produced(reciprocal.inputs[0], "Sqrt")
    add = None if root is None else produced(root.inputs[0], "Add")
    if add is None or scalar(add.inputs[1]) is None:
        return None
    mean = produced(add.inputs[0], "ReduceMean")
    power = None if mean is None else produced(mean.inputs[0], "Pow")
    if mean is None or power is None or power.inputs[0] is not source or scalar(power.inputs[1]) != 2:
        return None
    axes = constant_tensor(mean.inputs[1]) if len(mean.inputs) > 1 else None
    return add if axes is not None and axes.numpy().tolist() == [-1] else None


def is_shifted_by_its_maximum(value: ir.Value) -> bool:
    """Whether a value is x − ReduceMax(x)."""
    subtract = value.producer()
    if subtract is None or subtract.op_type != "Sub" or subtract.inputs[1] is None:
        return False
    maximum = subtract.inputs[1].producer()
    return maximum is not None and maximum.op_type == "ReduceMax" and maximum.inputs[0] is subtract.inputs[0]


def remove_unused(graph: ir.Graph, values: Iterable[ir.Value | None]) -> None:
    """Remove what produces `values` as far as nothing uses it: nodes, what they alone used, and initialisers."""
    pending = [value for value in values if value is not None]
    while pending:
        value = pending.pop()
        if value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        if node is None:
            if value.name is not None and value.name in graph.initializers and not value.is_graph_input():
                del graph.initializers[value.name]
            continue
        if node.graph is not graph or any(out.uses() or out.is_graph_output() for out in node.outputs):
            continue
        inputs = [used for used in node.inputs if used is not None]
        graph.remove(node, safe=True)
        pending.extend(inputs)


def require_same(model: ir.Model, wanted: ir.Model) -> None:
    """Hold a model to another, bit for bit: interface, nodes in their order, constants.

    Raises:
        ConversionError: they differ.

    """
    if model.opset_imports != wanted.opset_imports or model.functions or _ports(model) != _ports(wanted):
        raise ConversionError("Its inputs, outputs, functions or operator sets are not those of its reference.")
    for node, other in zip_longest(model.graph, wanted.graph):
        if node is None or other is None or _description(node) != _description(other):
            raise ConversionError(f"{(node or other).name} is not what its reference makes.")
    constants, expected = model.graph.initializers, wanted.graph.initializers
    for name in sorted(constants.keys() | expected.keys()):
        if not (name in constants and name in expected and _is_same(constants[name], expected[name])):
            raise ConversionError(f"{name} does not hold what its reference makes.")


def _ports(model: ir.Model) -> list[list[str | None]]:
    return [[value.name for value in values] for values in (model.graph.inputs, model.graph.outputs)]


def _description(node: ir.Node) -> tuple[Any, ...]:
    values = [[None if value is None else value.name for value in side] for side in (node.inputs, node.outputs)]
    attributes = {name: ir.serde.serialize_attribute(attribute) for name, attribute in node.attributes.items()}
    return node.domain, node.op_type, node.overload, values, attributes


def _is_same(value: ir.Value, wanted: ir.Value) -> bool:
    first, second = value.const_value, wanted.const_value
    if first is None or second is None or (first.dtype, first.shape.numpy()) != (second.dtype, second.shape.numpy()):
        return False
    if first.dtype is ir.DataType.STRING:
        return False
    one, other = (np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8) for tensor in (first, second))
    pieces = (slice(start, start + _PIECE) for start in range(0, one.size, _PIECE))
    return all(np.array_equal(one[piece], other[piece]) for piece in pieces)
