"""The layers whose weights MNN's converter rounds, rounded ahead of it: error-compensated, on samples of their own."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import onnx_ir as ir
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from sa3_convert.arrays import Floats
from sa3_convert.check.inputs import Sample, sample_inputs
from sa3_convert.components import SPECS, Component
from sa3_convert.errors import ConversionError
from sa3_convert.mnn.layer_rules import LIFTED_SUFFIX
from sa3_convert.networks.build import build_network
from sa3_convert.passes.quantise_embedding import best_curve, quantise_rows
from sa3_convert.recipe import ComponentRecipe, WeightScheme
from sa3_convert.rounding.compensated import Kept, RoundedLinear, Streams, reaching, round_blocks
from sa3_convert.rounding.grid import grid_for, round_least_squares

_SHARED_TOO_OFTEN: Final = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """One quantisable layer."""

    name: str
    """Name of the ONNX output, which recipes' rules match."""
    node: ir.Node
    weight: ir.Value
    transposed: bool
    """Whether the graph holds [in, out], as a MatMul does, instead of [out, in, *kernel]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as [out, in, *kernel]."""
        tensor = self.weight.const_value
        assert tensor is not None
        shape = tuple(tensor.shape.numpy())
        return shape[::-1] if self.transposed else shape

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear over the last dimension of its input (not a convolution)."""
        return self.node.op_type != "Conv"

    def read(self) -> Floats:
        """Return the weight as [out, in, *kernel] float32."""
        tensor = self.weight.const_value
        assert tensor is not None
        values = np.asarray(tensor.numpy(), dtype=np.float32)
        return np.ascontiguousarray(values.T) if self.transposed else values

    def replace(self, rewrite: Callable[[Floats], Floats]) -> None:
        """Put `rewrite(weight)` in the weight's place; it is computed when the graph is saved, one layer at a time."""
        original = self.weight.const_value
        assert original is not None
        transposed = self.transposed

        def evaluate() -> ir.TensorProtocol:
            values = np.array(original.numpy(), dtype=np.float32)
            if isinstance(original, ir.ExternalTensor):
                original.release()  # what was mapped would stay resident: in the end, the whole model
            rewritten = rewrite(np.ascontiguousarray(values.T) if transposed else values)
            return ir.Tensor(np.ascontiguousarray(rewritten.T if transposed else rewritten), name=original.name)

        self.weight.const_value = ir.LazyTensor(
            evaluate, dtype=ir.DataType.FLOAT, shape=ir.Shape(original.shape.numpy()), name=original.name
        )


def quantisable_layers(model: ir.Model) -> list[Layer]:
    """Return the graph's quantisable layers, in graph order."""
    layers = []
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or not weight.is_initializer():
            continue
        rank = len(weight.const_value.shape)
        if (node.op_type == "Conv") != (rank > 2) or rank < 2 or len(weight.uses()) > _SHARED_TOO_OFTEN:
            continue
        name = node.outputs[0].name
        assert name is not None
        # MatMul has no such attribute.
        flag = node.attributes.get("transB")
        transposed = node.op_type in ("MatMul", "Gemm") and not (flag is not None and flag.as_int())
        layers.append(Layer(name.removesuffix(LIFTED_SUFFIX), node, weight, transposed))
    return layers


@dataclass(frozen=True, slots=True)
class PlannedWeights:
    """A file of weights [out, in] float32, each on the grid of the model that will be written."""

    path: Path

    @classmethod
    def write(cls, path: Path, linears: Iterable[RoundedLinear]) -> "PlannedWeights":
        """Keep the weights of linears by their names in a safetensors file."""
        save_file({linear.name: linear.weight for linear in linears}, path)
        return cls(path)

    def names(self) -> frozenset[str]:
        """Return the layers that it holds; a missing or damaged file is a ConversionError, as for `read`."""
        try:
            with safe_open(self.path, "numpy") as file:
                return frozenset(file.keys())
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from None

    def read(self, layer: str) -> Floats:
        """Return one layer's weight."""
        try:
            with safe_open(self.path, "numpy") as file:
                weight: Floats = file.get_tensor(layer)
                return weight
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> ConversionError:
        return ConversionError(f"Rounded weights {self.path} cannot be read: {error}. Convert again.")


if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

CALIBRATION_SEED: Final = 1000
"""First seed of calibration; verification uses small ones, so nothing is judged on what it was made from."""
CHECK_SEED: Final = 2000
"""First seed of the samples on which rounding proves itself."""
_INPUTS_PER_SAMPLE: Final[Mapping[Component, int]] = {Component.TEXT_ENCODER: 3, Component.DIT: 48}
"""A prompt has a hundred tokens on average; with few positions per input, what is fitted does not carry over: twice as
many prompts are worth 0.35 dB on others."""
_LEAST_SAMPLES: Final = 16
_CHECKED_SHARE: Final = 10
"""One sample to check with for this many to fit on."""
_LEAST_CHECKED: Final = 3
_LATENTS: Final = 64


def round_network(
    checkpoint: "Checkpoint",
    component: Component,
    recipe: ComponentRecipe,
    *,
    threads: int | None = None,
    kept: Kept = lambda _, make: make(),
    tell: Callable[[int, int], None] = lambda *_: None,
) -> list[RoundedLinear]:
    """Round the linears of a component's stack as its recipe says; without threads, torch keeps its number.

    `kept` may know the layers of an earlier run, and `tell` is told how many are done, and of how many.
    """
    if threads:
        torch.set_num_threads(threads)
    scheme, stack = recipe.weights, SPECS[component].stack
    assert scheme is not None
    assert stack is not None
    network = build_network(component, checkpoint.layout, checkpoint.state(component))
    blocks = {f"{stack}.{name}": block for name, block in network.get_submodule(stack).named_children()}
    fit = max(_LEAST_SAMPLES, _width(blocks) // _INPUTS_PER_SAMPLE[component])
    check = max(_LEAST_CHECKED, fit // _CHECKED_SHARE)
    inputs = [
        _without_padding(sample_inputs(component, checkpoint.layout, seed=seed, latents=_LATENTS))
        for seed in (*range(CALIBRATION_SEED, CALIBRATION_SEED + fit), *range(CHECK_SEED, CHECK_SEED + check))
    ]
    with torch.no_grad():
        first = next(iter(blocks))
        originals = [(state, rest) for state, *rest in reaching(network, first, inputs)]
        _round_front(network, stack, scheme)
        with stored_embedding(network, recipe):
            moved = [(state, rest) for state, *rest in reaching(network, first, inputs)]
        streams = [Streams(*calls) for calls in zip(originals, moved, strict=True)]
        return list(round_blocks(blocks, streams[:fit], streams[fit:], partial(grid_for, scheme), kept, tell))


def _width(blocks: Mapping[str, nn.Module]) -> int:
    """Return the inputs of the first linear, which takes the state."""
    modules = (module for block in blocks.values() for module in block.modules())
    return next(module.in_features for module in modules if isinstance(module, nn.Linear))


def _without_padding(sample: Sample) -> list[Tensor]:
    """Return a sample's inputs in the order of the contract, cut to a prompt's own length or without masked latents."""
    feeds = dict(sample.feeds)
    if "attention_mask" in feeds:
        count = int(feeds["attention_mask"].sum())
        feeds = {name: array[:, :count] for name, array in feeds.items()}
    if "padding_mask" in feeds:
        feeds["padding_mask"] = np.ones_like(feeds["padding_mask"])
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.values()]


def _round_front(network: nn.Module, stack: str, scheme: WeightScheme) -> None:
    """Round linears and convolutions outside the stack as the graph's will be, in place."""
    for name, module in network.named_modules():
        grid = grid_for(scheme, name)
        if isinstance(module, nn.Linear | nn.Conv1d) and not name.startswith(f"{stack}.") and grid is not None:
            rounded = round_least_squares(module.weight.detach().numpy(), grid)
            module.weight = nn.Parameter(torch.from_numpy(rounded), requires_grad=False)


@contextlib.contextmanager
def stored_embedding(network: nn.Module, recipe: ComponentRecipe) -> Iterator[None]:
    """Let token tables give rows as they will be stored."""
    half = recipe.floats == "fp16"

    def quantised(table: nn.Module, bits: Literal[4, 8]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        assert isinstance(table, nn.Embedding)
        curve = best_curve(table.weight.detach().numpy(), bits, half_scales=half)

        def replace(_: nn.Module, __: Any, rows: Tensor) -> Tensor:
            flat = rows.flatten(0, -2).numpy()
            stored = quantise_rows(flat, bits, half_scales=half, curve=curve).dequantised()
            return torch.from_numpy(stored).reshape(rows.shape)

        return replace

    def halved(_: nn.Module, __: Any, rows: Tensor) -> Tensor:
        return rows.half().float()

    tables = [module for module in network.modules() if isinstance(module, nn.Embedding)]
    handles: list[Any] = []
    for table in tables:
        match recipe.embedding:
            case "float" if half:
                handles.append(table.register_forward_hook(halved))
            case "int8" | "int4":
                handles.append(table.register_forward_hook(quantised(table, 8 if recipe.embedding == "int8" else 4)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
