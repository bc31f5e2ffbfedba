"""A network → an ONNX graph as torch writes it: one example length traced, every length right.

The exporter's own optimiser stays off: it runs shape inference node by node, which on a graph that repeats its blocks
takes five times as long as the export itself. `simplify` does what is needed of it.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import sympy
import torch
from torch import nn

from sa3_convert.components import Contract, Dimension, Length
from sa3_convert.errors import ConversionError

OPSET = 18
"""The last one in which norms and attention decompose into operators that MNN has."""

EXAMPLE_LATENTS = 24
"""T of the traced example: whole attention windows of SAME-S, and far from the lengths 0 and 1 that torch fixes."""

_LONGEST = 1 << 24
"""A dimension below which no length may be bounded; the longest in use is 380 s of 44.1 kHz audio."""

LENGTH = sympy.Symbol("T", integer=True, positive=True)


def traced(module: nn.Module, contract: Contract) -> ir.Model:
    """Trace `module` and return the graph that torch writes, inputs and outputs as the contract names them.

    Args:
        module: its `forward` takes the contract's inputs in order and returns the contract's one output.
        contract: names, dtypes and shapes.

    Returns:
        A model whose initialisers are the module's own parameters, not copies; dimensions that follow the length are
        expressions in T.

    Raises:
        ConversionError: torch cannot trace the module, or what it traced holds for some lengths only.

    """
    dtypes = {"float32": torch.float32, "int32": torch.int32}
    examples = tuple(torch.zeros(port.concrete(EXAMPLE_LATENTS), dtype=dtypes[port.dtype]) for port in contract.inputs)
    dynamic = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(port.shape) if isinstance(dim, Length)}
        for port in contract.inputs
    )
    with _quiet():
        try:
            program = torch.export.export(module, examples, dynamic_shapes=dynamic, strict=False)
            onnx_program = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
            raise ConversionError(f"torch {torch.__version__} cannot export this network: {error}") from error
    assert onnx_program is not None
    model = onnx_program.model
    if (len(model.graph.inputs), len(model.graph.outputs)) != (len(contract.inputs), len(contract.outputs)):
        raise ConversionError("The network does not take and return what its contract says.")
    symbols = _symbols_in_latents(model.graph, contract)
    _check_ranges(program, symbols)
    _express_in_latents(model.graph, contract, symbols)
    for value, port in zip(model.graph.inputs, contract.inputs, strict=True):
        value.name = port.name
    for value, port in zip(model.graph.outputs, contract.outputs, strict=True):
        value.name = port.name
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about packages that are not installed off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _symbols_in_latents(graph: ir.Graph, contract: Contract) -> dict[str, sympy.Expr]:
    """Return torch's own symbols as expressions in T."""
    symbols: dict[str, sympy.Expr] = {}
    for value, port in zip(graph.inputs, contract.inputs, strict=True):
        assert value.shape is not None
        for traced_dim, dim in zip(value.shape, port.shape, strict=True):
            if isinstance(dim, Length):
                symbol, in_latents = _solved(str(traced_dim), dim)
                if symbols.setdefault(symbol, in_latents) != in_latents:
                    raise ConversionError(f"{port.name}: its length is bound to another input's otherwise than by T.")
    return symbols


def _check_ranges(program: torch.export.ExportedProgram, symbols: Mapping[str, sympy.Expr]) -> None:
    """Refuse a trace that took a branch which only some lengths take. Torch always sets 0 and 1 apart."""
    for symbol, bounds in program.range_constraints.items():
        shortest = max(2, symbols.get(str(symbol), LENGTH).subs(LENGTH, 2))
        if bounds.lower > shortest or bounds.upper < _LONGEST:
            raise ConversionError(
                f"The network was traced for lengths {symbol} from {bounds.lower} to {bounds.upper} only: "
                "something in it branches on the length."
            )


def _express_in_latents(graph: ir.Graph, contract: Contract, symbols: Mapping[str, sympy.Expr]) -> None:
    """Rewrite the symbols in every shape; inputs and outputs get exactly what the contract declares."""
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_rewritten(dim, symbols) for dim in value.shape])
    for value, port in zip([*graph.inputs, *graph.outputs], [*contract.inputs, *contract.outputs], strict=True):
        value.shape = ir.Shape([declared(dim) for dim in port.shape])


def declared(dim: Dimension) -> int | str:
    """Return a contract's dimension as ONNX declares it: 32, `T` or `16*T`."""
    return str(dim.factor * LENGTH) if isinstance(dim, Length) else dim


def _solved(traced_dim: str, dim: Length) -> tuple[str, sympy.Expr]:
    """Solve `traced_dim` = factor·T for the symbol in it; with chunks in pairs torch writes 2·s for an even length."""
    match = re.fullmatch(r"(?:(\d+)\*)?(s\d+)", traced_dim)
    if match is None:
        raise ConversionError(f"A length was traced as {traced_dim!r}, expected one that stays free.")
    return match[2], dim.factor * LENGTH / int(match[1] or 1)


def _rewritten(dim: int | ir.SymbolicDim, symbols: Mapping[str, sympy.Expr]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return str(sympy.sympify(dim.value, locals=dict(symbols)))
