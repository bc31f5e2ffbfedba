"""One component of a checkpoint → its reference ONNX: `<name>.onnx` with its weights in `<name>.onnx.data`."""

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from torch import Tensor, nn

from sa3_convert.components import Component, Contract, Port, contract
from sa3_convert.errors import ConversionError
from sa3_convert.export.simplify import give_readable_names, simplify
from sa3_convert.export.trace import declared, traced
from sa3_convert.networks.autoencoder import latents_multiple
from sa3_convert.networks.build import build_network
from sa3_convert.networks.conditioners import TextEncoder
from sa3_convert.networks.layers import MASKED
from sa3_convert.system.files import atomic_pair

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

INLINE_BELOW = 256
"""Bytes from which a tensor lies in the `.data` file; smaller ones are what graph tools want to look at."""

_DATA = ".data"
_TYPES = {"float32": "FLOAT", "int32": "INT32"}
"""What ONNX calls the contract's."""
_PRODUCER = "sa3-convert"


def onnx_from_module(module: nn.Module, contract: Contract, path: Path, *, multiple: int = 1) -> None:
    """Export a network to ONNX opset 18, float32.

    Only T is dynamic. Every T that is a multiple of `multiple` is right; any other is refused when the model is run.
    The same weights give the same bytes. At no time is there a second copy of the weights in memory.

    Args:
        module: in eval mode, without gradients; `forward` takes the contract's inputs in order, returns its one output.
        contract: names, dtypes and shapes of inputs and outputs.
        path: the `.onnx` file; `<path>.data` is written beside it. Both appear only when whole and checked.
        multiple: what T must be a multiple of: 2 for SAME-S, whose attention windows hold two latents.

    Raises:
        ConversionError: the network cannot be exported for every length, or the result fails the checker.

    """
    model = traced(module, contract, multiple)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    parameters |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    # Tables that follow from parameters are not kept twice when they are equal; parameters are.
    simplify(model, module.state_dict().keys())
    give_readable_names(model, parameters)
    _forget_origin(model)
    model.graph.name = path.stem
    _write(model, contract, path)


def _forget_origin(model: ir.Model) -> None:
    """Remove torch's notes: stack traces of this machine, and what would differ between two exports."""
    common.ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    for value in [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]:
        value.metadata_props.clear()
    model.producer_name, model.producer_version = _PRODUCER, None


def _write(model: ir.Model, contract: Contract, path: Path) -> None:
    with atomic_pair(path, _DATA) as temporary:
        ir.save(
            model,
            temporary,
            format="protobuf",
            external_data=temporary.name + _DATA,
            size_threshold_bytes=INLINE_BELOW,
        )
        check_onnx(temporary, contract)


def check_onnx(path: Path, contract: Contract) -> None:
    """Check an exported file: the standard's checker, shape inference, and inputs and outputs as the contract says."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ConversionError(f"The exported {path.name} is not valid ONNX: {error}") from error
    graph = onnx.load(path, format="protobuf", load_external_data=False).graph
    for kind, values, ports in (
        ("inputs", graph.input, contract.inputs),
        ("outputs", graph.output, contract.outputs),
    ):
        found = [_described(value) for value in values]
        wanted = [(port.name, _TYPES[port.dtype], tuple(declared(dim) for dim in port.shape)) for port in ports]
        if found != wanted:
            raise ConversionError(f"The exported {path.name} has {kind} {found}, the contract says {wanted}.")


def _described(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return value.name, onnx.TensorProto.DataType.Name(tensor.elem_type), shape


class _Embedded(nn.Module):
    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs_embeds: Tensor, attention_bias: Tensor) -> Tensor:
        return self.encoder.encode(inputs_embeds, 1 - attention_bias * (1 / MASKED))


def export_embedded_text_encoder(checkpoint: "Checkpoint", path: Path) -> None:
    """Export the text encoder without its table to `path` (and `<path>.data`); raises what `export_component` does."""
    (output,) = contract(Component.TEXT_ENCODER, checkpoint.layout).outputs
    _, tokens, width = output.shape
    ports = Contract(
        (Port("inputs_embeds", "float32", (1, tokens, width)), Port("attention_bias", "float32", (1, tokens))),
        (output,),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    state = checkpoint.state(Component.TEXT_ENCODER, scratch=path.parent)
    encoder = build_network(Component.TEXT_ENCODER, checkpoint.layout, state)
    assert isinstance(encoder, TextEncoder)
    onnx_from_module(_Embedded(encoder).eval(), ports, path)


def export_component(checkpoint: "Checkpoint", component: Component, path: Path, rank: int | None = None) -> None:
    """Export a component to `path` (and `<path>.data`), with slots for adapters of a rank; let go of its weights.

    Raises:
        UsageError: the checkpoint has no such component.
        LoraError: a weight is not finite with the adapters in it.
        CheckpointError: its weights are missing, damaged, or do not fit its configuration.
        ConversionError: the export failed or failed its checks; nothing is left under the final name.

    """
    ports = contract(component, checkpoint.layout, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    auto = checkpoint.layout.autoencoder
    halves = {Component.DECODER: auto.decoder, Component.ENCODER: auto.encoder}
    multiple = latents_multiple(halves[component]) if component in halves else 1
    network = build_network(component, checkpoint.layout, checkpoint.state(component, scratch=path.parent), rank=rank)
    try:
        onnx_from_module(network, ports, path, multiple=multiple)
    finally:
        # What torch traced refers to itself and to the weights; the next component needs the memory.
        del network
        gc.collect()
