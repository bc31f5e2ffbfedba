"""Every component of both golden families: the exported ONNX computes what the network computes, at every length."""

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sa3_convert.components import Component, Length
from sa3_convert.errors import CheckpointError, ModelFileError, UsageError
from sa3_convert.export.component import export_component
from tests.conftest import Golden, assert_close_to_peak, load_golden
from tests.export.conftest import Exported, golden_checkpoint, realistic_feeds, signal_to_noise_db

Export = Callable[[str, Component], Exported]
FAMILIES = ("small", "medium")
EACH = pytest.mark.parametrize(("family", "component"), [(f, c) for f in FAMILIES for c in Component])
SAME_S = pytest.mark.parametrize("component", [Component.DECODER, Component.ENCODER])

LEAST_DB = 100.0
"""Both sides compute in float32 in the same order; sums differ in their order only, which leaves 118 dB or more.

That holds for the DiT too, although its Fourier phases reach 6·10⁴ rad, where float32 is 4·10⁻³ rad coarse: the graph
multiplies in the network's order, (t·f)·2π, so both round to the same phase. 2π·(t·f) would leave about 65 dB.
"""

# What the graphs may consist of. Not among it: Where, Equal, Less, And, Not, Mod, integer Div (wrong on some backends),
# Reduce{L1,L2,LogSum…} (axes ignored), Round, Resize, Loop, If, sequences.
ALLOWED = {
    *("Add", "Cast", "Clip", "Concat", "Conv", "Cos", "Div", "Expand", "Gather", "Gemm", "MatMul", "Mul", "Pad", "Pow"),
    *("Range", "Reciprocal", "ReduceMean", "ReduceSum", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax"),
    *("Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze"),
}
# Integers are for lengths and token ids only.
ON_INTEGERS = {"Shape", "Squeeze", "Gather", "Cast", "Concat", "Slice", "Add", "Unsqueeze"}


@EACH
def test_one_export_equals_the_network_at_every_length(family: str, component: Component, exported: Export) -> None:
    model = exported(family, component)
    if not model.contract.is_dynamic:
        lengths: tuple[int, ...] = (0,)
    elif component is Component.DIT:
        lengths = (1, 2, 3, 7, 17, 40, 75)
    else:
        lengths = tuple(range(2, 41, 2)) if model.even else (*range(1, 9), 13, 40)
    for latents in lengths:
        feeds = realistic_feeds(model.contract, latents, seed=latents)
        result = model.by_onnx(feeds)
        assert result.shape == model.contract.outputs[0].concrete(latents)
        assert signal_to_noise_db(model.by_network(feeds), result) >= LEAST_DB, f"T = {latents}"


@pytest.mark.parametrize("component", [Component.DECODER, Component.ENCODER])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_of_an_autoencoder_grows_with_the_square_of_the_length(
    family: str, component: Component, exported: Export
) -> None:
    shapes = [value.shape for node in ir.load(exported(family, component).path).graph for value in node.outputs]
    known = [[str(dim) for dim in shape if not isinstance(dim, int)] for shape in shapes if shape is not None]
    assert any(known)
    assert all(len(lengths) <= 1 and "**" not in "".join(lengths) for lengths in known)


@pytest.mark.parametrize("time", [0.0, 0.01, 0.37, 0.5, 0.75, 0.99, 1.0])
def test_the_dit_keeps_its_phases_at_every_time(time: float, exported: Export) -> None:
    model = exported("small", Component.DIT)
    feeds = realistic_feeds(model.contract, 9) | {"t": np.array([time], np.float32)}
    assert signal_to_noise_db(model.by_network(feeds), model.by_onnx(feeds)) >= LEAST_DB


@SAME_S
@pytest.mark.parametrize("latents", [1, 3, 25])
def test_same_s_refuses_an_odd_number_of_latents(component: Component, latents: int, exported: Export) -> None:
    model = exported("small", component)
    with pytest.raises(ModelFileError, match="cannot be run with"):
        model.by_onnx(realistic_feeds(model.contract, latents))


@EACH
def test_inputs_and_outputs_are_exactly_the_contract(family: str, component: Component, exported: Export) -> None:
    model = exported(family, component)
    graph = ir.load(model.path).graph
    types = {"float32": ir.DataType.FLOAT, "int32": ir.DataType.INT32}
    for values, ports in ((graph.inputs, model.contract.inputs), (graph.outputs, model.contract.outputs)):
        assert [value.name for value in values] == [port.name for port in ports]
        for value, port in zip(values, ports, strict=True):
            assert value.dtype == types[port.dtype]
            assert value.shape is not None
            for found, wanted in zip(value.shape, port.shape, strict=True):
                if isinstance(wanted, Length):
                    assert str(found) == ("T" if wanted.factor == 1 else f"{wanted.factor}*T")
                else:
                    assert found == wanted


@EACH
def test_the_graph_holds_no_operator_that_backends_get_wrong(
    family: str, component: Component, exported: Export
) -> None:
    model = ir.load(exported(family, component).path)
    assert dict(model.opset_imports) == {"": 18}
    assert {node.op_type for node in model.graph} <= ALLOWED
    integer = {
        node.op_type
        for node in model.graph
        if any(value.dtype not in (ir.DataType.FLOAT, None) for value in node.outputs)
    }
    assert integer <= ON_INTEGERS


@EACH
def test_shapes_are_constants_and_nothing_is_computed_twice(
    family: str, component: Component, exported: Export
) -> None:
    graph = ir.load(exported(family, component).path).graph
    operators = [node.op_type for node in graph]
    assert operators.count("Shape") <= 1
    for node in graph:
        if node.op_type in ("Reshape", "Slice", "Pad", "Split"):
            assert all(value is None or value.is_initializer() for value in node.inputs[1:]), node.name
    written = [(n.op_type, tuple(n.inputs), str(sorted(n.attributes.items(), key=str))) for n in graph]
    assert len(set(written)) == len(written)


@EACH
def test_every_linear_has_a_constant_weight_and_its_modules_name(
    family: str, component: Component, exported: Export
) -> None:
    model = exported(family, component)
    linears = {name for name, module in model.network.named_modules() if type(module).__name__ == "Linear"}
    graph = ir.load(model.path).graph
    found = set()
    for node in graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is not None and weight.is_initializer():
            name = node.outputs[0].name
            assert name == node.name
            assert weight.name == f"{name}.weight"
            assert weight.shape is not None
            assert len(weight.shape) == 2
            found.add(name)
    assert linears <= found


@EACH
def test_weights_are_the_checkpoints_in_float32(family: str, component: Component, exported: Export) -> None:
    model = exported(family, component)
    tensors = {name: value.const_value for name, value in ir.load(model.path).graph.initializers.items()}
    state = model.network.state_dict()
    named = {name for name in state if name in tensors}
    assert {name for name in state if state[name].ndim >= 2 and name.endswith("weight")} <= named
    for name in named:
        found, wanted = tensors[name], state[name].numpy()
        assert found is not None
        assert found.dtype == ir.DataType.FLOAT
        assert np.array_equal(found.numpy(), wanted) or np.array_equal(found.numpy(), wanted.T), name


@EACH
def test_the_file_passes_the_checker_with_its_shapes_inferred(
    family: str, component: Component, exported: Export
) -> None:
    path = exported(family, component).path
    onnx.checker.check_model(str(path), full_check=True)
    untyped = [v.name for node in ir.load(path).graph for v in node.outputs if v.dtype is None or v.shape is None]
    assert untyped == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_dit_gives_the_golden_velocities(family: str, exported: Export) -> None:
    golden, model = load_golden(family), exported(family, Component.DIT)
    for case in golden.of("dit"):
        feeds = {port.name: golden.tensors[case[port.name]].astype(np.float32) for port in model.contract.inputs}
        valid = case["valid"]
        velocity, expected = model.by_onnx(feeds), golden.tensors[case["output_key_mask"]]
        assert_close_to_peak(velocity[..., :valid], expected[..., :valid], 1e-4)


def test_the_exported_autoencoder_gives_the_golden_tensors(golden: Golden, exported: Export) -> None:
    family = golden.folder.name
    for case in golden.of("decoder"):
        model = exported(family, Component.DECODER)
        if not (model.even and case["latent_length"] % 2):
            audio = model.by_onnx({"latents": golden.tensors[case["latents"]]})
            assert_close_to_peak(audio, golden.tensors[case["audio"]], 1e-4)
    for case in golden.of("encoder"):
        model = exported(family, Component.ENCODER)
        patched = golden.tensors[case["patched_audio"]]
        # Whole latents, and pairs of them for SAME-S, are the caller's to complete, with zeros as the network does.
        missing = -patched.shape[-1] % (32 if model.even else 16)
        latent = model.by_onnx({"patched_audio": np.pad(patched, ((0, 0), (0, 0), (0, missing)))})
        assert_close_to_peak(latent, golden.tensors[case["encoder_latent"]], 1e-4)


def test_the_exported_conditioners_give_the_golden_embeddings(golden: Golden, exported: Export) -> None:
    family = golden.folder.name
    for case in golden.of("text_encoder"):
        names = ("input_ids", "attention_mask")
        feeds = {name: golden.tensors[case[name]].astype(np.int32) for name in names}
        hidden = exported(family, Component.TEXT_ENCODER).by_onnx(feeds)
        assert_close_to_peak(hidden, golden.tensors[case["output"]], 1e-4)
    for case in golden.of("number_conditioner"):
        feeds = {"seconds": np.array([case["seconds"]], np.float32)}
        embedding = exported(family, Component.NUMBER_CONDITIONER).by_onnx(feeds)
        assert_close_to_peak(embedding, golden.tensors[case["output"]].reshape(embedding.shape), 1e-4)


def test_a_component_that_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    whole = golden_checkpoint("small").layout
    layout = dataclasses.replace(whole, dit=None, text_encoder=None, number_conditioner=None, objective=None)
    with pytest.raises(UsageError, match="autoencoder alone"):
        export_component(SimpleNamespace(layout=layout), Component.DIT, tmp_path / "dit.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_weight_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    whole = golden_checkpoint("small")
    state = whole.state(Component.NUMBER_CONDITIONER)
    lost = state.pop(next(iter(state)))
    assert lost.numel()
    damaged = SimpleNamespace(layout=whole.layout, state=lambda _, scratch: state)
    with pytest.raises(CheckpointError, match="is missing"):
        export_component(damaged, Component.NUMBER_CONDITIONER, tmp_path / "number_conditioner.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_weights_are_let_go_of(tmp_path: Path) -> None:
    checkpoint = golden_checkpoint("small")
    weights = checkpoint.state(Component.NUMBER_CONDITIONER)
    kept = [weakref.ref(tensor) for tensor in weights.values()]
    borrowed = SimpleNamespace(layout=checkpoint.layout, state=lambda _, scratch: weights)
    export_component(borrowed, Component.NUMBER_CONDITIONER, tmp_path / "number_conditioner.onnx")
    weights.clear()
    assert [ref for ref in kept if ref() is not None] == []
