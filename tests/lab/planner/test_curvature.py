"""Curvature is what it says: how much the output moves with a weight, for tokens apart and together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sa3_convert.check.inputs import Region, Sample
from sa3_convert.lab.planner.sensitivity import Curvature, measure_curvature, sampled_rows

INPUTS, OUTPUTS = 24, 40


class Gated(nn.Module):
    """A linear on tokens, its outputs scaled by a linear on what all tokens share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Linear(INPUTS, OUTPUTS)
        self.shared = nn.Linear(INPUTS, OUTPUTS)
        self.requires_grad_(False)
        self.runs = 0

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        self.runs += 1
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


def nothing(done: int, total: int) -> None:
    pass


def test_one_linear_is_measured_exactly(tmp_path: Path) -> None:
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False).requires_grad_(False)
    x = np.random.default_rng(0).standard_normal((1, INPUTS)).astype(np.float32)
    sample = Sample("one", 1, {"x": x})
    found = measure_curvature(linear, {"it": "weight"}, [sample], tmp_path / "kept", nothing)["it"]
    share = np.square(x[0]) / float(np.square(linear(torch.from_numpy(x)).numpy()).sum())
    np.testing.assert_allclose(found.rows, np.broadcast_to(share, found.rows.shape), rtol=1e-5)
    assert found.total == pytest.approx(OUTPUTS * share.sum(), rel=1e-5)


@pytest.mark.parametrize("layer", WEIGHTS)
def test_it_predicts_what_a_change_of_a_weight_costs(tmp_path: Path, layer: str) -> None:
    network, inputs = Gated(), samples(64)
    found = measure_curvature(network, WEIGHTS, inputs, tmp_path / "kept", nothing)
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


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = measure_curvature(Gated(), WEIGHTS, samples(5), tmp_path / "whole", nothing)

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    network = Gated()
    with pytest.raises(KeyboardInterrupt):
        measure_curvature(network, WEIGHTS, samples(5), tmp_path / "kept", interrupt)
    assert network.runs == 3
    resumed = measure_curvature(network, WEIGHTS, samples(5), tmp_path / "kept", nothing)
    assert network.runs == 5
    assert not any(parameter.requires_grad for parameter in network.parameters())
    for layer, curvature in whole.items():
        np.testing.assert_array_equal(resumed[layer].rows, curvature.rows)
        assert resumed[layer].total == curvature.total


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x00" * 64])
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "kept").write_bytes(content)
    network = Gated()
    measure_curvature(network, WEIGHTS, samples(2), tmp_path / "kept", nothing)
    assert network.runs == 2


def test_a_changed_bit_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    whole = measure_curvature(Gated(), WEIGHTS, samples(2), path, nothing)
    data = path.read_bytes()
    path.write_bytes(data[:-200] + bytes([data[-200] ^ 1]) + data[-199:])
    network = Gated()
    again = measure_curvature(network, WEIGHTS, samples(2), path, nothing)
    assert network.runs == 2
    assert {layer: c.total for layer, c in again.items()} == {layer: c.total for layer, c in whole.items()}


def test_a_layer_that_does_not_reach_the_output_costs_nothing() -> None:
    silent = Curvature(np.zeros((4, INPUTS), np.float32), 0.0)
    assert silent.error(np.ones((4, INPUTS), np.float32)) == 0
