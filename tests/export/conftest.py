"""Golden components exported once each, and what the export tests compare with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component, Contract, contract
from sa3_convert.export.component import export_component
from sa3_convert.networks.build import build_network
from sa3_convert.ort import OrtSession
from tests.conftest import GOLDEN

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Exported:
    """A golden component: its file, and the network that it came from."""

    family: str
    component: Component
    path: Path
    contract: Contract
    network: nn.Module
    session: OrtSession

    @property
    def even(self) -> bool:
        return self.family == "small" and self.component in (Component.DECODER, Component.ENCODER)

    def by_network(self, feeds: Feeds) -> NDArray[np.float32]:
        with torch.inference_mode():
            result: NDArray[np.float32] = self.network(
                *(torch.from_numpy(feeds[port.name]) for port in self.contract.inputs)
            ).numpy()
        return result

    def by_onnx(self, feeds: Feeds) -> NDArray[np.float32]:
        return self.session.run(feeds)[self.contract.outputs[0].name]


@cache
def golden_checkpoint(family: str) -> Checkpoint:
    return Checkpoint.open(GOLDEN / family / "checkpoint")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Component], Exported]:
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def export(family: str, component: Component) -> Exported:
        checkpoint = golden_checkpoint(family)
        path = folder / family / f"{component.value}.onnx"
        export_component(checkpoint, component, path)
        network = build_network(component, checkpoint.layout, checkpoint.state(component))
        session = OrtSession(path, threads=1)
        return Exported(family, component, path, contract(component, checkpoint.layout), network, session)

    return export


def realistic_feeds(ports: Contract, latents: int, seed: int = 0) -> Feeds:
    """Inputs as generation has them: half of the text and two thirds of the latents are padding-free."""
    random = np.random.default_rng(seed)
    feeds: Feeds = {}
    for port in ports.inputs:
        shape = port.concrete(latents)
        match port.name:
            case "input_ids":
                value: NDArray[Any] = random.integers(1, 200, shape)
            case "attention_mask":
                value = np.arange(shape[1])[None] < shape[1] // 2
            case "padding_mask":
                value = np.arange(shape[1])[None] < max(1, shape[1] * 2 // 3)
            case "t":
                value = random.random(shape)
            case "seconds":
                value = random.random(shape) * 120
            case _:
                value = random.standard_normal(shape)
        feeds[port.name] = value.astype(port.dtype)
    return feeds


def signal_to_noise_db(reference: NDArray[Any], target: NDArray[Any]) -> float:
    wanted = reference.astype(np.float64)
    noise = float(np.square(wanted - target.astype(np.float64)).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(np.square(wanted).sum() / noise))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
