"""What the traced graphs hold: no integer or boolean arithmetic, and one graph for every length."""

from functools import cache
from typing import Any

import pytest
import torch
from torch.export import Dim, ExportedProgram

from sa3_convert.components import Component, contract
from sa3_convert.networks.autoencoder import latents_multiple
from tests.networks.conftest import layout_of, network

LENGTHS = [
    (family, component)
    for family in ("small", "medium")
    for component in (Component.DIT, Component.DECODER, Component.ENCODER)
]
# These two are the same network in every family.
FIXED = [("small", Component.TEXT_ENCODER), ("small", Component.NUMBER_CONDITIONER)]
# The casts and ranges that turn an integer input or a length into floats, and the look-up of token embeddings.
FROM_INTEGERS = {"_to_copy", "to", "arange", "embedding", "zeros_like"}


@cache
def traced(family: str, component: Component) -> ExportedProgram:
    layout = layout_of(family)
    steps = 1 if component is Component.DIT else latents_multiple(layout.autoencoder.decoder)
    length = Dim("length", min=1, max=4096)
    inputs: list[torch.Tensor] = []
    shapes: list[dict[int, Any]] = []
    for port in contract(component, layout).inputs:
        shape = port.concrete(3 * steps)
        inputs.append(torch.ones(shape, dtype=torch.int32 if port.dtype == "int32" else torch.float32))
        factors = [unit // steps for unit in port.concrete(steps)]
        dynamic = [axis for axis, (a, b) in enumerate(zip(shape, port.concrete(steps), strict=True)) if a != b]
        shapes.append({axis: length * (steps * factors[axis]) for axis in dynamic})
    return torch.export.export(network(family, component), tuple(inputs), dynamic_shapes=tuple(shapes), strict=False)


@pytest.mark.parametrize(("family", "component"), LENGTHS + FIXED)
def test_no_operator_computes_on_integers_or_booleans(family: str, component: Component) -> None:
    program = traced(family, component).run_decompositions({})
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            assert value.dtype == torch.float32, f"{node.target} gives {value.dtype}"
            integers = [
                given
                for given in node.all_input_nodes
                if isinstance(given.meta["val"], torch.Tensor) and not given.meta["val"].is_floating_point()
            ]
            assert not integers or node.target.overloadpacket.__name__ in FROM_INTEGERS, node.target


@pytest.mark.parametrize(("family", "component"), LENGTHS)
def test_one_graph_serves_every_length(family: str, component: Component) -> None:
    layout = layout_of(family)
    # The guards keep torch's own runtime from lengths of one; the graph is right for them all the same.
    module = traced(family, component).module(check_guards=False)
    steps = 1 if component is Component.DIT else latents_multiple(layout.autoencoder.decoder)
    for latents in (steps, 2 * steps, 7 * steps):
        generator = torch.Generator().manual_seed(latents)
        inputs = [
            torch.randn(port.concrete(latents), generator=generator) for port in contract(component, layout).inputs
        ]
        torch.testing.assert_close(module(*inputs), network(family, component)(*inputs))
