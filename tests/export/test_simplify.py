"""Each rewrite on the smallest graph that has something for it, and on the ones that it must leave alone."""

import numpy as np
import onnx_ir as ir
import pytest

from sa3_convert.export.simplify import (
    clamp_integers,
    fix_reshapes,
    remove_no_ops,
    share_constants,
    simplify,
    transpose_weights,
)

FLOAT = ir.TensorType(ir.DataType.FLOAT)
INT64_MAX = np.iinfo(np.int64).max


class Builder:
    """Builds a one-input graph node by node."""

    def __init__(self, *shape: int | str) -> None:
        self.x = ir.Value(name="x", type=FLOAT, shape=ir.Shape(shape))
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": 18}, name="g")

    def constant(self, name: str, data: object, dtype: type = np.int64) -> ir.Value:
        tensor = ir.tensor(np.array(data, dtype), name=name)
        shape = ir.Shape(np.shape(data))
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(self, operator: str, *inputs: ir.Value, shape: tuple[int | str, ...], **attributes: object) -> ir.Value:
        node = ir.node(operator, list(inputs), attributes=attributes)
        node.outputs[0].name = f"{operator}_{len(self.graph)}"
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), FLOAT
        self.graph.append(node)
        return node.outputs[0]

    def model(self, *outputs: ir.Value) -> ir.Model:
        self.graph.outputs.extend(outputs)
        return ir.Model(self.graph, ir_version=10)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def linear(build: Builder, perm: list[int]) -> ir.Model:
    weight = build.constant("to_out.weight", np.arange(6).reshape(3, 2), np.float32)
    turned = build.node("Transpose", weight, shape=(2, 3), perm=perm)
    return build.model(build.node("MatMul", build.x, turned, shape=("T", 3)))


def test_a_transposed_weight_becomes_a_constant_under_its_own_name() -> None:
    model = linear(Builder("T", 2), [1, 0])
    assert transpose_weights(model) == 1
    assert operators(model) == ["MatMul"]
    weight = model.graph.initializers["to_out.weight"]
    assert model.graph[0].inputs[1] is weight
    np.testing.assert_array_equal(weight.const_value.numpy(), np.arange(6, dtype=np.float32).reshape(3, 2).T)


def test_the_transposed_weight_is_a_view_not_a_copy() -> None:
    model = linear(Builder("T", 2), [1, 0])
    before = model.graph.initializers["to_out.weight"].const_value.numpy()
    transpose_weights(model)
    assert np.shares_memory(before, model.graph.initializers["to_out.weight"].const_value.numpy())


def test_a_weight_that_is_used_both_ways_keeps_its_name_and_the_view_gets_another() -> None:
    build = Builder("T", 2)
    weight = build.constant("tied.weight", np.ones((2, 2)), np.float32)
    turned = build.node("Transpose", weight, shape=(2, 2), perm=[1, 0])
    product = build.node("MatMul", build.x, turned, shape=("T", 2))
    model = build.model(build.node("MatMul", product, weight, shape=("T", 2)))
    assert transpose_weights(model) == 1
    assert set(model.graph.initializers) == {"tied.weight", "tied.weight.transposed"}


def test_two_linears_over_one_weight_share_one_view() -> None:
    build = Builder("T", 2)
    weight = build.constant("tied.weight", np.ones((2, 2)), np.float32)
    product = build.x
    for _ in range(2):
        turned = build.node("Transpose", weight, shape=(2, 2), perm=[1, 0])
        product = build.node("MatMul", product, turned, shape=("T", 2))
    model = build.model(product)
    assert transpose_weights(model) == 1
    assert operators(model) == ["MatMul", "MatMul"]
    assert set(model.graph.initializers) == {"tied.weight"}


def test_a_transpose_of_activations_or_of_nothing_stays() -> None:
    build = Builder("T", 2)
    model = build.model(build.node("Transpose", build.x, shape=(2, "T"), perm=[1, 0]))
    assert transpose_weights(model) == 0
    assert transpose_weights(linear(Builder("T", 3), [0, 1])) == 0
    assert operators(model) == ["Transpose"]


def reshaped(source: tuple[int | str, ...], result: tuple[int | str, ...]) -> ir.Model:
    build = Builder(*source)
    shape = build.node("Shape", build.x, shape=(len(source),))
    return build.model(build.node("Reshape", build.x, shape, shape=result, allowzero=1))


@pytest.mark.parametrize(
    ("source", "result", "expected"),
    [
        ((1, "T", 128), (1, "T", 2, 64), [1, 0, 2, 64]),
        ((1, "16*T", 128), ("T", 16, 128), [-1, 16, 128]),
        (("T", "T + 64", 8), ("T", "T + 64", 2, 4), [0, 0, 2, 4]),
        (("T", 2, "T + 64"), ("T", "2*T + 128"), [0, -1]),
        ((4, 6), (2, 12), [2, 12]),
    ],
)
def test_a_computed_shape_becomes_a_constant(
    source: tuple[int | str, ...], result: tuple[int | str, ...], expected: list[int]
) -> None:
    model = reshaped(source, result)
    assert fix_reshapes(model) == 1
    node = model.graph[1]
    assert node.inputs[1].const_value.numpy().tolist() == expected
    assert "allowzero" not in node.attributes


def test_a_shape_with_two_dimensions_that_cannot_be_told_stays_computed() -> None:
    model = reshaped(("T", "U"), ("2*U", "T/2"))
    assert fix_reshapes(model) == 0
    assert model.graph[1].inputs[1].producer() is not None


def test_a_constant_shape_stays_and_loses_allowzero_only() -> None:
    build = Builder(4, 6)
    shape = build.constant("shape", [2, -1])
    model = build.model(build.node("Reshape", build.x, shape, shape=(2, 12), allowzero=1))
    assert fix_reshapes(model) == 0
    assert model.graph[0].inputs[1] is shape
    assert "allowzero" not in model.graph[0].attributes


def sliced(start: int, end: int, step: int = 1) -> ir.Model:
    build = Builder("T", 8)
    bounds = [build.constant(n, [v]) for n, v in (("start", start), ("end", end), ("axis", 0), ("step", step))]
    taken = build.node("Slice", build.x, *bounds, shape=("T", 8))
    return build.model(build.node("Neg", taken, shape=("T", 8)))


def test_a_slice_that_takes_everything_goes() -> None:
    model = sliced(0, INT64_MAX)
    assert remove_no_ops(model) == 1
    assert operators(model) == ["Neg"]
    assert model.graph[0].inputs[0] is model.graph.inputs[0]


@pytest.mark.parametrize("bounds", [(1, INT64_MAX, 1), (0, 7, 1), (0, -1, 1), (0, INT64_MAX, 2), (-1, INT64_MAX, 1)])
def test_a_slice_that_takes_a_part_stays(bounds: tuple[int, int, int]) -> None:
    assert remove_no_ops(sliced(*bounds)) == 0


def test_a_slice_with_a_computed_bound_stays() -> None:
    build = Builder("T", 8)
    end = build.node("Shape", build.x, shape=(1,), end=1)
    start, axis, step = (build.constant(name, [value]) for name, value in (("s", 0), ("a", 0), ("t", 1)))
    taken = build.node("Slice", build.x, start, end, axis, step, shape=("T", 8))
    assert remove_no_ops(build.model(build.node("Neg", taken, shape=("T", 8)))) == 0


@pytest.mark.parametrize(
    ("source", "result", "removed"), [((4, 8), (4, 8), 1), ((1, 8), (4, 8), 0), (("T",), ("T",), 0)]
)
def test_an_expand_goes_only_if_all_dimensions_are_known_to_stay(
    source: tuple[int | str, ...], result: tuple[int | str, ...], removed: int
) -> None:
    build = Builder(*source)
    wide = build.node("Expand", build.x, build.constant("shape", [1]), shape=result)
    assert remove_no_ops(build.model(build.node("Neg", wide, shape=result))) == removed


@pytest.mark.parametrize(("back", "left"), [((1, "16*T"), ["Neg"]), ((1, "8*T", 2), ["Reshape", "Reshape", "Neg"])])
def test_reshapes_there_and_back_go(back: tuple[int | str, ...], left: list[str]) -> None:
    build = Builder(1, "16*T")
    there = build.node("Reshape", build.x, build.constant("there", [1, -1, 16]), shape=(1, "T", 16))
    again = build.node("Reshape", there, build.constant("back", [1, -1]), shape=back)
    model = build.model(build.node("Neg", again, shape=back))
    remove_no_ops(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert operators(model) == left


def test_an_output_keeps_its_node_even_if_it_does_nothing() -> None:
    build = Builder(4)
    model = build.model(build.node("Expand", build.x, build.constant("shape", [4]), shape=(4,)))
    assert remove_no_ops(model) == 0


def test_the_end_of_a_slice_comes_into_32_bits() -> None:
    model = sliced(1, INT64_MAX)
    assert clamp_integers(model) == 1
    assert [v.const_value.numpy().tolist() for v in model.graph[0].inputs[1:]] == [[1], [2**31 - 1], [0], [1]]
    assert clamp_integers(sliced(-(2**31), 2**31 - 1)) == 0


def test_equal_small_constants_are_shared_but_equal_parameters_are_not() -> None:
    build = Builder(2)
    values = [build.constant(name, [1.0, 2.0], np.float32) for name in ("a", "b", "norm.gamma", "norm.beta")]
    total = build.x
    for value in values:
        total = build.node("Add", total, value, shape=(2,))
    model = build.model(total)
    assert share_constants(model, {"norm.gamma", "norm.beta"}) == 1
    assert set(model.graph.initializers) == {"a", "norm.gamma", "norm.beta"}
    assert [node.inputs[1].name for node in model.graph] == ["a", "a", "norm.gamma", "norm.beta"]


def test_constants_that_differ_in_type_or_shape_only_are_not_shared() -> None:
    build = Builder(2)
    build.constant("a", [0, 0], np.float32)
    build.constant("b", [0], np.int64)
    build.constant("c", [[0, 0]], np.float32)
    assert share_constants(build.model(build.x), set()) == 0


def test_simplify_folds_what_it_uncovers_and_infers_the_rest() -> None:
    build = Builder("T", 4)
    weight = build.constant("w.weight", np.ones((4, 4)), np.float32)
    turned = build.node("Transpose", weight, shape=(4, 4), perm=[1, 0])
    product = build.node("MatMul", build.x, turned, shape=("T", 4))
    shape = build.node("Shape", product, shape=(2,))
    same = build.node("Reshape", product, shape, shape=("T", 4), allowzero=1)
    squashed = build.node("Tanh", same, shape=("T", 4))
    squashed.shape = squashed.type = None
    twice = [build.node("Neg", squashed, shape=("T", 4)) for _ in range(2)]
    model = build.model(build.node("Add", *twice, shape=("T", 4)))
    simplify(model, {"w.weight"})
    assert operators(model) == ["MatMul", "Tanh", "Neg", "Add"]
    assert set(model.graph.initializers) == {"w.weight"}
    assert str(model.graph[1].outputs[0].shape) == "[T,4]"
