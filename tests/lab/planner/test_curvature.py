"""Curvature is what it says: how much the output moves with a weight, for tokens apart and together."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sa3_convert.check.inputs import Region, Sample
from sa3_convert.lab.planner.sensitivity import (
    Curvature,
    Curvatures,
    curvatures_of,
    mean_of,
    read_curvatures,
    sampled_rows,
    write_curvatures,
)

INPUTS, OUTPUTS = 24, 40


class Gated(nn.Module):
    """A linear on tokens, its outputs scaled by a linear on what all tokens share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Linear(INPUTS, OUTPUTS)
        self.shared = nn.Linear(INPUTS, OUTPUTS)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.tanh(self.token(x)) * self.shared(condition)[:, None]
        return output


WEIGHTS = {"token": "token.weight", "shared": "shared.weight"}


def samples(count: int, tokens: int = 12) -> list[Sample]:
    made = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        feeds = {
            "x": random.standard_normal((1, tokens, INPUTS)).astype(np.float32),
            "condition": random.standard_normal((1, INPUTS)).astype(np.float32),
        }
        made.append(Sample(str(seed), tokens, feeds, (Region(axis=1, stop=tokens - 2),)))
    return made


def measured(network: nn.Module, weights: Mapping[str, str], inputs: Sequence[Sample]) -> Curvatures:
    return mean_of(curvatures_of(network, weights, sample, seed) for seed, sample in enumerate(inputs))


def test_one_linear_is_measured_exactly() -> None:
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False).requires_grad_(False)
    x = np.random.default_rng(0).standard_normal((1, INPUTS)).astype(np.float32)
    sample = Sample("one", 1, {"x": x})
    found = measured(linear, {"it": "weight"}, [sample])["it"]
    share = np.square(x[0]) / float(np.square(linear(torch.from_numpy(x)).numpy()).sum())
    np.testing.assert_allclose(found.rows, np.broadcast_to(share, found.rows.shape), rtol=1e-5)
    assert found.total == pytest.approx(OUTPUTS * share.sum(), rel=1e-5)


@pytest.mark.parametrize("layer", WEIGHTS)
def test_it_predicts_what_a_change_of_a_weight_costs(layer: str) -> None:
    network, inputs = Gated(), samples(64)
    found = measured(network, WEIGHTS, inputs)
    parameter = network.get_parameter(WEIGHTS[layer])
    change = 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))

    def outputs() -> list[torch.Tensor]:
        return [
            network(*(torch.from_numpy(feed) for feed in sample.feeds.values()))[:, : sample.latents - 2]
            for sample in inputs
        ]

    before = outputs()
    parameter += change
    shares = [float((a - b).square().sum() / b.square().sum()) for a, b in zip(outputs(), before, strict=True)]
    predicted = found[layer].error(sampled_rows(change.numpy()))
    assert 10 * np.log10(predicted / np.mean(shares)) == pytest.approx(0, abs=1)


def test_nothing_requires_a_gradient_afterwards() -> None:
    network = Gated()
    curvatures_of(network, WEIGHTS, samples(1)[0], 0)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())


def test_what_is_written_is_read_to_the_bit(tmp_path: Path) -> None:
    found = measured(Gated(), WEIGHTS, samples(2))
    write_curvatures(tmp_path / "kept", found)
    again = read_curvatures(tmp_path / "kept")
    assert again.keys() == found.keys()
    for layer, curvature in found.items():
        np.testing.assert_array_equal(again[layer].rows, curvature.rows, strict=True)
        assert again[layer].total == curvature.total


def test_a_layer_that_does_not_reach_the_output_costs_nothing() -> None:
    silent = Curvature(np.zeros((4, INPUTS), np.float32), 0.0)
    assert silent.error(np.ones((4, INPUTS), np.float32)) == 0
