"""Building networks: the weights must fit exactly, and are used in place."""

from dataclasses import replace

import pytest
import torch

from sa3_convert.components import Component
from sa3_convert.errors import CheckpointError, UsageError
from sa3_convert.networks.build import build_network
from tests.networks.conftest import layout_of, state_of


@pytest.fixture(params=list(Component))
def component(request: pytest.FixtureRequest) -> Component:
    chosen: Component = request.param
    return chosen


@pytest.fixture
def state(component: Component) -> dict[str, torch.Tensor]:
    return state_of("small", component)


State = dict[str, torch.Tensor]


def test_weights_are_used_in_place(component: Component, state: State) -> None:
    network = build_network(component, layout_of("small"), state)
    loaded = network.state_dict()
    assert loaded.keys() == state.keys()
    assert all(loaded[name].data_ptr() == weight.data_ptr() for name, weight in state.items())


def test_a_network_is_ready_for_inference(component: Component, state: State) -> None:
    network = build_network(component, layout_of("small"), state)
    tensors = [*network.parameters(), *network.buffers()]
    assert not network.training
    assert not any(tensor.requires_grad or tensor.is_meta for tensor in tensors)


def test_each_missing_weight_is_refused_by_name(component: Component, state: State) -> None:
    for name in state:
        without = {other: weight for other, weight in state.items() if other != name}
        with pytest.raises(CheckpointError, match=rf"{component.value} .*{name} is missing"):
            build_network(component, layout_of("small"), without)


def test_an_unknown_weight_is_refused_by_name(component: Component, state: State) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.99\.weight is not known"):
        build_network(component, layout_of("small"), state | {"layers.99.weight": torch.zeros(1)})


def test_each_weight_of_another_shape_is_refused_with_both_shapes(component: Component, state: State) -> None:
    for name, weight in state.items():
        wrong = torch.zeros(*weight.shape, 2)
        with pytest.raises(CheckpointError, match=rf"{name} has shape \[.*2\], expected \["):
            build_network(component, layout_of("small"), state | {name: wrong})


def test_a_weight_that_is_not_float32_is_refused(component: Component, state: State) -> None:
    name = next(iter(state))
    with pytest.raises(CheckpointError, match=rf"{name} is torch\.bfloat16, expected torch\.float32"):
        build_network(component, layout_of("small"), state | {name: state[name].bfloat16()})


def test_many_problems_are_told_briefly(component: Component, state: State) -> None:
    extra = {f"stray.{number}": torch.zeros(1) for number in range(12)}
    with pytest.raises(CheckpointError, match=r"stray\.0 is not known.*and 7 more"):
        build_network(component, layout_of("small"), state | extra)


def test_the_weights_of_medium_do_not_fit_the_layout_of_small() -> None:
    for component in (Component.DIT, Component.DECODER):
        with pytest.raises(CheckpointError, match=r"Is model_config\.json of another checkpoint"):
            build_network(component, layout_of("small"), state_of("medium", component))


@pytest.mark.parametrize("absent", [Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER, Component.DIT])
def test_an_autoencoder_alone_has_no_such_component(absent: Component) -> None:
    layout = replace(layout_of("small"), dit=None, text_encoder=None, number_conditioner=None, objective=None)
    with pytest.raises(UsageError, match=absent.value):
        build_network(absent, layout, {})
