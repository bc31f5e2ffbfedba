"""A network → an ONNX graph as torch writes it: one example length traced, every length right.

The exporter's own optimiser stays off: it runs shape inference node by node, which on a graph that repeats its blocks
takes five times as long as the export itself. `simplify` does what is needed of it.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sa3_convert.components import Contract, Dimension, Length, Port
from sa3_convert.errors import ConversionError
from sa3_convert.system.log import taken_in

OPSET = 18
"""The last one in which norms and attention decompose into operators that MNN has."""

EXAMPLE_UNITS = 13
"""The traced example's length, in units: a prime, so that a network that needs an undeclared multiple cannot be traced,
and none of the lengths 0 and 1, which torch treats apart."""

LENGTH = sympy.Symbol("T", integer=True, positive=True)

_LONGEST = 1 << 24
"""A dimension below which no length may be bounded; the longest in use is 380 s of 44.1 kHz audio."""


def traced(module: nn.Module, contract: Contract, multiple: int = 1) -> ir.Model:
    """Trace `module` and return the graph that torch writes, inputs and outputs as the contract declares them.

    Its initialisers are the module's own parameters, not copies; dimensions that follow the length are expressions in
    T, a multiple of `multiple`. What torch cannot trace, or what holds for some lengths only, is a `ConversionError`.
    """
    with _quiet(), _taking_units(module, contract, multiple):
        try:
            program = torch.export.export(
                module,
                tuple(_example(port, multiple) for port in contract.inputs),
                dynamic_shapes=tuple(_dynamic(port) for port in contract.inputs),
                strict=False,
            )
            onnx_program = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
            raise ConversionError(f"torch {torch.__version__} cannot export this network: {error}") from error
    assert onnx_program is not None
    model = onnx_program.model
    if (len(model.graph.inputs), len(model.graph.outputs)) != (len(contract.inputs), len(contract.outputs)):
        raise ConversionError("The network does not take and return what its contract says.")
    symbol = _length_symbol(model.graph, contract)
    _check_ranges(program, symbol)
    _express_in_latents(model.graph, symbol, multiple)
    _declare(model.graph, contract, multiple)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Take the exporter's remarks about packages that are not installed into the log, and start no thread.

    torch.fx makes a progress bar that it does not show; the bar starts a thread to watch over it, and when there is no
    memory for a thread Python waits for ever for it to begin.
    """
    interval = tqdm.monitor_interval
    tqdm.monitor_interval = 0
    try:
        with taken_in("torch.onnx"):
            yield
    finally:
        tqdm.monitor_interval = interval


def _unit(dim: Dimension, multiple: int) -> int:
    """Return what a dynamic dimension is a multiple of."""
    return dim.factor * multiple if isinstance(dim, Length) else 0


def _in_units(port: Port, multiple: int, length: int) -> list[int]:
    """Return a port's shape with each dynamic dimension cut into [units, unit], unless its unit is 1."""
    shape: list[int] = []
    for dim in port.shape:
        unit = _unit(dim, multiple)
        shape += [dim] if isinstance(dim, int) else [length] if unit == 1 else [length, unit]
    return shape


def _example(port: Port, multiple: int) -> Tensor:
    dtype = {"float32": torch.float32, "int32": torch.int32}[port.dtype]
    return torch.zeros(_in_units(port, multiple, EXAMPLE_UNITS), dtype=dtype)


def _dynamic(port: Port) -> dict[int, Any]:
    """Return which axes of the example vary. No port has more than one, so cutting moves none of them."""
    return {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(port.shape) if isinstance(dim, Length)}


@contextlib.contextmanager
def _taking_units(module: nn.Module, contract: Contract, multiple: int) -> Iterator[None]:
    """Let `module` take its inputs with their lengths cut into [units, unit].

    Then torch knows a length as 16·u rather than as some s with s mod 16 = 0, and every quotient of it is a polynomial:
    with nested floor divisions its reasoning about shapes takes many times as long as all the rest.
    """
    axes = [
        next((axis for axis, dim in enumerate(port.shape) if _unit(dim, multiple) > 1), None)
        for port in contract.inputs
    ]

    def joined(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x if axis is None else x.flatten(axis, axis + 1) for x, axis in zip(inputs, axes, strict=True))

    handle = module.register_forward_pre_hook(joined)
    try:
        yield
    finally:
        handle.remove()


def _length_symbol(graph: ir.Graph, contract: Contract) -> str | None:
    """Return torch's symbol for the number of units; None if the component has no length."""
    found = {
        str(value.shape[axis])
        for value, port in zip(graph.inputs, contract.inputs, strict=True)
        for axis in _dynamic(port)
        if value.shape is not None
    }
    if len(found) > 1 or not all(re.fullmatch(r"s\d+", symbol) for symbol in found):
        raise ConversionError(f"The network ties its lengths to {', '.join(sorted(found))}; expected one that is free.")
    return next(iter(found), None)


def _check_ranges(program: torch.export.ExportedProgram, symbol: str | None) -> None:
    """Refuse a trace that took a branch which only some lengths take."""
    for name, bounds in program.range_constraints.items():
        if str(name) != symbol or bounds.lower > 2 or bounds.upper < _LONGEST:
            raise ConversionError(
                f"The network was traced for {name} from {bounds.lower} to {bounds.upper} only: "
                "something in it branches on the length."
            )


def _express_in_latents(graph: ir.Graph, symbol: str | None, multiple: int) -> None:
    """Rewrite torch's symbol in every shape as an expression in T."""
    known = {} if symbol is None else {symbol: LENGTH / multiple}
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                dims = [dim if isinstance(dim, int) else str(sympy.sympify(str(dim), known)) for dim in value.shape]
                value.shape = ir.Shape(dims)


def declared(dim: Dimension) -> int | str:
    """Return a contract's dimension as ONNX declares it: 32, `T` or `16*T`."""
    return str(dim.factor * LENGTH) if isinstance(dim, Length) else dim


def _declare(graph: ir.Graph, contract: Contract, multiple: int) -> None:
    """Give inputs and outputs the contract's names and shapes; a length that was cut is cut inside the graph."""
    for index, port in enumerate(contract.inputs):
        value = graph.inputs[index]
        if all(_unit(dim, multiple) <= 1 for dim in port.shape):
            value.name, value.shape = port.name, _shape(port)
            continue
        graph.inputs[index] = ir.Value(name=port.name, type=value.type, shape=_shape(port))
        cut = ir.tensor(np.array(_in_units(port, multiple, -1), np.int64), name=f"{port.name}.units")
        target = ir.Value(
            name=cut.name, type=ir.TensorType(cut.dtype), shape=ir.Shape([len(port.shape) + 1]), const_value=cut
        )
        graph.register_initializer(target)
        node = ir.node("Reshape", [graph.inputs[index], target])
        graph.insert_before(graph[0], node)
        value.replace_all_uses_with(node.outputs[0])
    for value, port in zip(graph.outputs, contract.outputs, strict=True):
        if value.shape is None or [str(dim) for dim in value.shape] != [str(dim) for dim in _shape(port)]:
            raise ConversionError(f"The network returns {value.shape}; its contract says {port.name} {_shape(port)}.")
        value.name, value.shape = port.name, _shape(port)


def _shape(port: Port) -> ir.Shape:
    return ir.Shape([declared(dim) for dim in port.shape])
