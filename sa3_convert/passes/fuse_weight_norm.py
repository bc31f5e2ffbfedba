"""Weight norm becomes the weight it stands for.

    W = g · v / ‖v‖        ‖v‖ = sqrt(Σ v²) over all axes but the first (one norm per output channel)

with v and g constant. Accepted is every spelling that comes to this: the norm as ReduceL2, ReduceSumSquare and Sqrt,
or ReduceSum over Mul(v, v) or Pow(v, 2); the quotient as Div or as Mul with Reciprocal or Pow(·, −0.5), in any order;
Cast, Identity, Transpose and reshapes in between or behind. So that no spelling can be mistaken, the subgraph is
evaluated and held against the formula before it is replaced.

Left unfused, MNN reduces a ReduceL2 whose axes are an input over all axes: the encoder comes out at 1.2 dB.

Nothing is done when
- v or g is not constant (computed at run time, or an initialiser that is a graph input too),
- the norm is taken over other axes, or is not the Euclidean one,
- the norm, or any other value in between, is used elsewhere or is a graph output,
- the result is not finite (a channel of zeros).
"""

import math

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from sa3_convert.passes import ir_tools

_RESHAPING = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_ARITHMETIC = frozenset({"Abs", "Add", "Clip", "Div", "Max", "Mul", "Pow", "Reciprocal", "Sqrt", "Expand"})
_REDUCTIONS = frozenset({"ReduceL2", "ReduceSum", "ReduceSumSquare"})
_ALLOWED = _RESHAPING | _ARITHMETIC | _REDUCTIONS
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})

_TOLERANCE = 1e-5
"""Largest difference from the formula, relative to the largest weight: float32 sums of up to 10⁴ squares need 1e-6."""


def fuse_weight_norm(model: ir.Model) -> int:
    """Replace each weight norm of constants by one constant, in place; return how many."""
    graph = model.graph
    constant_nodes = _constant_nodes(graph)
    new = ir_tools.Additions(graph)
    count = 0
    for node in [n for n in graph if n in constant_nodes]:
        (result,) = node.outputs
        if result.is_graph_output() or any(user in constant_nodes for user, _ in result.uses()):
            continue
        cone = _cone(result)
        fused = _fused(result, cone, model.opset_imports.get("", 0))
        if fused is None:
            continue
        result.replace_all_uses_with(new.constant(*fused))
        ir_tools.remove_unused(graph, [result])
        count += 1
    return count


def _constant_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes of accepted operators that depend on nothing but constants."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.domain or node.op_type not in _ALLOWED or len(node.outputs) != 1:
            continue
        inputs = [value for value in node.inputs if value is not None]
        if all(v.producer() in found or ir_tools.constant_tensor(v) is not None for v in inputs):
            found.add(node)
    return found


def _cone(result: ir.Value) -> list[ir.Node]:
    """Return the nodes that `result` is computed by, in the order of evaluation."""
    ordered: list[ir.Node] = []

    def visit(value: ir.Value | None) -> None:
        node = None if value is None else value.producer()
        if node is None or node in ordered or node.op_type == "Constant":
            return
        for used in node.inputs:
            visit(used)
        ordered.append(node)

    visit(result)
    return ordered


def _fused(result: ir.Value, cone: list[ir.Node], opset: int) -> tuple[str, NDArray[np.float32]] | None:
    """Return the weight that `result` is, and a name for it, if the cone is a weight norm and nothing else."""
    if sum(node.op_type in _REDUCTIONS for node in cone) != 1:
        return None
    inside = set(cone)
    between = [out for node in cone for out in node.outputs if out is not result]
    if any(out.is_graph_output() or any(user not in inside for user, _ in out.uses()) for out in between):
        return None
    leaves = {
        value.name or "": value for node in cone for value in node.inputs if value and value.producer() not in inside
    }
    parameters = _direction_and_magnitude(leaves)
    product = _before_reshaping(result)
    if parameters is None or product is None:
        return None
    direction, magnitude = parameters
    evaluated, weight = _evaluate(cone, list(leaves.values()), [product, result], opset)
    expected = _weight_norm(leaves[direction], leaves[magnitude])
    if evaluated.shape != expected.shape or weight.dtype != np.float32 or not np.isfinite(expected).all():
        return None
    # A comparison with NaN is false, so a result that is not finite is not accepted either.
    close = np.abs(evaluated.astype(np.float64) - expected).max() <= _TOLERANCE * np.abs(expected).max()
    name = direction.removesuffix("_v") if direction.endswith("weight_v") else f"{direction}.fused"
    return (name, np.ascontiguousarray(weight)) if close else None


def _direction_and_magnitude(leaves: dict[str, ir.Value]) -> tuple[str, str] | None:
    """Return the names of v and g: of the float constants, the tensor and the one with a number per row of it."""
    constants = {
        name: tensor for name, leaf in leaves.items() if (tensor := ir_tools.constant_tensor(leaf)) is not None
    }
    shapes = {name: tensor.shape.numpy() for name, tensor in constants.items() if tensor.dtype in _FLOATS}
    tensors = {name: shape for name, shape in shapes.items() if len(shape) >= 2 or math.prod(shape) > 1}
    if len(tensors) != 2:
        return None
    magnitude, direction = sorted(tensors, key=lambda name: math.prod(tensors[name]))
    rows, numbers, size = tensors[direction][0], math.prod(tensors[magnitude]), math.prod(tensors[direction])
    return (direction, magnitude) if len(tensors[direction]) >= 2 and numbers == rows < size else None


def _before_reshaping(result: ir.Value) -> ir.Value | None:
    value: ir.Value | None = result
    while value is not None and (node := value.producer()) is not None and node.op_type in _RESHAPING:
        value = node.inputs[0]
    return value


def _weight_norm(direction: ir.Value, magnitude: ir.Value) -> NDArray[np.float64]:
    v = ir_tools.array(direction).astype(np.float64)
    g = ir_tools.array(magnitude).astype(np.float64).reshape((-1,) + (1,) * (v.ndim - 1))
    norm = np.sqrt((v * v).sum(axis=tuple(range(1, v.ndim)), keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        weight: NDArray[np.float64] = g * v / norm
    return weight


def _evaluate(
    cone: list[ir.Node], leaves: list[ir.Value], results: list[ir.Value], opset: int
) -> list[NDArray[np.generic]]:
    constants = [onnx.numpy_helper.from_array(np.ascontiguousarray(ir_tools.array(leaf)), leaf.name) for leaf in leaves]
    outputs = [onnx.helper.make_empty_tensor_value_info(value.name or "") for value in results]
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in cone], "weight_norm", [], outputs, constants
    )
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)]))
    with np.errstate(divide="ignore", invalid="ignore"):
        return [np.asarray(value) for value in evaluator.run(None, {})]
