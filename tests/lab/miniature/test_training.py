"""A training goes on where it was stopped, to the same weights, and what it leaves is a checkpoint that runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sa3_convert.checkpoint.lora_file import LoraRequest
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.components import Component
from sa3_convert.lab.miniature.autoencoder import Autoencoder, fitted
from sa3_convert.lab.miniature.model import DIT_DEPTH, layout
from sa3_convert.lab.miniature.sounds import render, sampled
from sa3_convert.lab.miniature.train import ADAPTER, BASE, FEW_STEPS, QUICK, train
from sa3_convert.lab.miniature.training import Training
from sa3_convert.runtime.output_checks import CHECKS
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest


class StoppedError(Exception):
    """Somebody has stopped the training."""


def quiet(*_: object) -> None:
    """Say nothing."""


def small_training(folder: Path, stop_at: int | None = None) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    weight = torch.zeros(4, 3, requires_grad=True)
    training = Training(folder, "small", {"weight": weight}, steps=40, rate=0.1, seed=3)
    training.keep_every = 0.0

    def loss(generator: torch.Generator) -> Tensor:
        if training.step == stop_at:
            raise StoppedError
        return (weight - torch.randn(4, 3, generator=generator)).pow(2).mean()

    return training.run(loss, quiet)


def test_a_stopped_training_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = small_training(tmp_path / "whole")
    with pytest.raises(StoppedError):
        small_training(tmp_path / "parts", stop_at=17)
    again = small_training(tmp_path / "parts")
    assert torch.equal(again["weight"], whole["weight"])
    assert whole["weight"].abs().max() > 0.05


def test_the_autoencoder_begins_as_principal_components_that_bring_sounds_back() -> None:
    network = Autoencoder(layout(), fitted(layout(), 0))
    random = np.random.default_rng(8)
    pieces = [piece for piece in (sampled(random) for _ in range(12)) if piece.sounds[0].kind != "silence"]
    audio = torch.from_numpy(np.stack([render(piece) for piece in pieces]))
    with torch.inference_mode():
        back = network.decode(network.encode(audio))
    ratios = 10 * torch.log10(audio.pow(2).sum((1, 2)) / (audio - back).pow(2).sum((1, 2)))
    assert ratios.median() > 20


@pytest.mark.slow
def test_a_quick_training_leaves_checkpoints_that_generate_and_an_adapter(tmp_path: Path) -> None:
    train(tmp_path, QUICK, seed=1, report=quiet)
    for name in (FEW_STEPS, BASE):
        Checkpoint.open(tmp_path / name)
        with Pipeline.from_checkpoint(tmp_path / name) as pipeline:
            made = pipeline.generate(GenerateRequest("a sine tone at A5", seconds=1.0), allow=CHECKS)
        assert np.isfinite(made.audio).all()
    adapted = Checkpoint.open(tmp_path / FEW_STEPS).with_loras([LoraRequest(tmp_path / ADAPTER)])
    assert adapted.layers_changed(adapted.loras[0]) == {Component.DIT: 9 * DIT_DEPTH}
