"""An adapter for the miniature: a LoRA in the published format that is trained on one more sound, diminished chords.

The text encoder knows no word for them, and the DiT has never heard one; their latents are sums of ones that it knows.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.tensors import DIT_PREFIX
from sa3_convert.lab.miniature.autoencoder import Autoencoder
from sa3_convert.lab.miniature.diffusion import Diffusion, Examples, few_steps_loss
from sa3_convert.lab.miniature.sounds import Piece, sampled, sampled_sound
from sa3_convert.lab.miniature.text import Text
from sa3_convert.lab.miniature.training import Report, Training
from sa3_convert.system.files import atomic_path

_RANK: Final = 8
_RATE: Final = 2e-3
_PIECES: Final = 1000
_SHARE: Final = 0.6
"""Of the pieces that are the new sound; the others hold the model to what it knew."""


class _LowRank(nn.Module):
    """The weight of a linear [fan_out, fan_in] with B·A in it, B zero at first."""

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        fan_out, fan_in = weight.shape
        self.lora_A = nn.Parameter(torch.randn(_RANK, fan_in, generator=generator) * fan_in**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(fan_out, _RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora_B @ self.lora_A


def new_sound(random: np.random.Generator) -> Piece:
    """Return a diminished chord by chance."""
    while True:
        seconds = float(random.integers(2, 9)) / 2
        sound = sampled_sound(random, seconds)
        if sound.kind == "chord":
            return Piece((replace(sound, form="diminished"),), seconds)


def train_adapter(
    layout: CheckpointLayout,
    weights: Mapping[str, Tensor],
    text: Text,
    codec: Autoencoder,
    file: Path,
    *,
    state: Path,
    steps: int,
    seed: int,
    report: Report,
) -> None:
    """Train the LoRA on a model of few steps, or go on, and write it in float16."""
    network = Diffusion(layout, weights)
    generator = torch.Generator().manual_seed(seed)
    learned: dict[str, Tensor] = {}
    for name, module in network.dit.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("transformer.layers."):
            low_rank = _LowRank(module.weight, generator)
            parametrize.register_parametrization(module, "weight", low_rank)
            prefix = f"{DIT_PREFIX.removeprefix('model.')}{name}.parametrizations.weight.0"
            learned |= {f"{prefix}.{factor}": weight for factor, weight in low_rank.named_parameters()}

    def piece(random: np.random.Generator) -> Piece:
        return new_sound(random) if random.random() < _SHARE else sampled(random)

    examples = Examples.of(codec, state / "adapter-latents.safetensors", _PIECES, seed, report, piece)
    training = Training(state, "adapter", learned, steps=steps, rate=_RATE, seed=seed)
    made = training.run(few_steps_loss(network, text, examples), report)
    config = {"rank": _RANK, "alpha": _RANK, "adapter_type": "lora"}
    with atomic_path(file) as partial:
        halves = {name: factor.half().contiguous() for name, factor in made.items()}
        save_file(halves, partial, {"lora_config": json.dumps(config)})
