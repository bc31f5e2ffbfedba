"""A component's network with its weights in it."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.json_file import listed
from sa3_convert.components import Component
from sa3_convert.errors import CheckpointError, UsageError
from sa3_convert.networks.autoencoder import Decoder, Encoder
from sa3_convert.networks.conditioners import NumberConditioner, TextEncoder
from sa3_convert.networks.dit import Dit, Padding
from sa3_convert.networks.layers import Derived
from sa3_convert.networks.slots import SlottedDit, SlottedNumberConditioner

_Layout = TypeVar("_Layout")


def build_network(
    component: Component,
    layout: CheckpointLayout,
    state: Mapping[str, Tensor],
    *,
    padding: Padding = "key_mask",
    rank: int | None = None,
) -> nn.Module:
    """Build a component's network around the tensors of `state`, which are used in place, not copied.

    Args:
        component: which one.
        layout: the checkpoint's dimensions.
        state: parameter name → float32 tensor, exactly the names of the network.
        padding: what the DiT's `padding_mask` does; the other components have none.
        rank: of the slots for adapters; None is the network without them.

    Returns:
        A module in eval mode without gradients whose `forward` takes the contract's inputs in the contract's order and
        returns its single output.

    Raises:
        UsageError: a checkpoint of this layout has no such component.
        CheckpointError: a tensor is missing, extra, of another shape or not float32; the message names it.

    """
    with torch.device("meta"):
        network = _skeleton(component, layout, padding, rank)
    _load(network, state, component)
    for module in network.modules():
        if isinstance(module, Derived):
            module.derive()
    return network.eval().requires_grad_(False)


def _skeleton(component: Component, layout: CheckpointLayout, padding: Padding, rank: int | None) -> nn.Module:
    match component:
        case Component.DIT if rank is not None:
            return SlottedDit(layout, rank, padding)
        case Component.NUMBER_CONDITIONER if rank is not None:
            return SlottedNumberConditioner(layout, rank)
        case Component.TEXT_ENCODER:
            return TextEncoder(_part(layout.text_encoder, component))
        case Component.NUMBER_CONDITIONER:
            return NumberConditioner(_part(layout.number_conditioner, component))
        case Component.DIT:
            return Dit(_part(layout.dit, component), padding)
        case Component.DECODER:
            return Decoder(layout.autoencoder)
        case Component.ENCODER:
            return Encoder(layout.autoencoder)


def _part(part: _Layout | None, component: Component) -> _Layout:
    if part is None:
        raise UsageError(f"This checkpoint has no component {component.value!r}.")
    return part


def _load(network: nn.Module, state: Mapping[str, Tensor], component: Component) -> None:
    expected = network.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - state.keys()]
    problems += [f"{name} is not known" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        wanted, found = expected[name], state[name]
        if wanted.shape != found.shape:
            problems.append(f"{name} has shape {list(found.shape)}, expected {list(wanted.shape)}")
        elif found.dtype != torch.float32:
            problems.append(f"{name} is {found.dtype}, expected torch.float32")
    if problems:
        raise CheckpointError(
            f"The weights do not fit the {component.value} that model_config.json describes: "
            f"{listed(sorted(problems))}. Is model_config.json of another checkpoint?"
        )
    network.load_state_dict(dict(state), strict=True, assign=True)
