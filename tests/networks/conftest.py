"""Networks of the golden checkpoints, each built once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component
from sa3_convert.networks.build import build_network
from sa3_convert.networks.dit import Padding
from tests.conftest import GOLDEN, Golden

DIT_INPUTS = ("x", "t", "cross_attn_cond", "global_embed", "local_add_cond", "padding_mask")


@cache
def _checkpoint(family: str) -> Checkpoint:
    return Checkpoint.open(GOLDEN / family / "checkpoint")


@cache
def _network(family: str, component: Component, padding: Padding) -> nn.Module:
    return build_network(component, layout_of(family), state_of(family, component), padding=padding)


def network(family: str | Path, component: Component, padding: Padding = "key_mask") -> Any:
    return _network(Path(family).name, component, padding)


def layout_of(family: str) -> CheckpointLayout:
    return _checkpoint(family).layout


def state_of(family: str, component: Component) -> dict[str, Tensor]:
    return _checkpoint(family).state(component)


def tensor(golden: Golden, name: str) -> Tensor:
    return torch.from_numpy(golden.tensors[name])


def dit_inputs(golden: Golden, case: dict[str, Any]) -> list[Tensor]:
    return [tensor(golden, case[name]).float() for name in DIT_INPUTS]


def array(output: Tensor) -> NDArray[np.float32]:
    result: NDArray[np.float32] = output.numpy()
    return result


@pytest.fixture
def noise() -> Callable[..., Tensor]:
    """Seeded Gaussian tensors."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
