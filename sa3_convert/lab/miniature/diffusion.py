"""Training of the DiT: a rectified flow from captions and seconds to latents, and from it the form of a few steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.tensors import DIT_PREFIX, SECONDS_PREFIX
from sa3_convert.checkpoint.variants import DEFAULTS, LATENT_SAMPLES
from sa3_convert.components import Component
from sa3_convert.lab.miniature.autoencoder import Autoencoder
from sa3_convert.lab.miniature.captions import caption
from sa3_convert.lab.miniature.model import initial
from sa3_convert.lab.miniature.sounds import LATENTS, Piece, render, sampled
from sa3_convert.lab.miniature.text import Text
from sa3_convert.lab.miniature.training import Loss, Report, Training
from sa3_convert.networks.build import build_network
from sa3_convert.runtime.request import DEFAULT_INIT_NOISE
from sa3_convert.runtime.sampling import sigmas
from sa3_convert.system.files import atomic_path

_HALF: Final = 16
_RATE: Final = 2e-3
_FEW_STEPS_RATE: Final = 1.5e-3
_SOFTEST: Final = 0.1
_SOFTEST_ESTIMATE: Final = 0.002
"""Energy of latents below which a sound counts less than a loud one; a click's is 0.01, a tone's 0.25."""
_PAIRS: Final = 0.5
"""Share of pairs among the pieces: more than are judged, as each is a combination that is seen seldom."""
_WITHOUT_PROMPT: Final = 0.1
_INPAINTED: Final = 0.2
_BEGUN: Final = 0.15
"""Share of the examples of few steps that begin as audio to audio does, from another piece under noise."""
_BEGUN_AT: Final = (0.8, 0.95)
"""Noise levels of these."""
_ENCODED_AT_ONCE: Final = 8


def _sampled(random: np.random.Generator) -> Piece:
    return sampled(random, _PAIRS)


@dataclass(frozen=True)
class Examples:
    """Pieces and their latents [N, C, T] float16, encoded once."""

    pieces: Sequence[Piece]
    latents: Tensor

    @classmethod
    def of(
        cls,
        autoencoder: Autoencoder,
        file: Path,
        count: int,
        seed: int,
        report: Report,
        drawn: Callable[[np.random.Generator], Piece] = _sampled,
    ) -> "Examples":
        """Make so many, or take those that the file has."""
        random = np.random.default_rng(seed)
        pieces = [drawn(random) for _ in range(count)]
        if file.exists():
            return cls(pieces, load_file(file)["latents"])
        encoded = []
        for start in range(0, count, _ENCODED_AT_ONCE):
            chunk = range(start, min(start + _ENCODED_AT_ONCE, count))
            audio = torch.from_numpy(np.stack([render(pieces[index]) for index in chunk]))
            with torch.inference_mode():
                encoded.append(autoencoder.encode(audio).half())
            if start % (_ENCODED_AT_ONCE * 50) == 0:
                report("latents", start, count, 0.0, 0.0)
        latents = torch.cat(encoded)
        with atomic_path(file) as partial:
            save_file({"latents": latents}, partial)
        return cls(pieces, latents)


def _per_sound(energy: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Return the mean energy [B, T] of the sound to which each latent belongs; what follows a piece is its last's."""
    means = torch.empty_like(energy)
    for row, piece in enumerate(pieces):
        starts = [start // LATENT_SAMPLES for start, _ in piece.spans()]
        for start, end in pairwise([*starts, LATENTS]):
            means[row, start:end] = energy[row, start:end].mean()
    return means


class Diffusion:
    """DiT and number conditioner around one set of weights, by their names in a checkpoint."""

    def __init__(self, layout: CheckpointLayout, weights: Mapping[str, Tensor]) -> None:
        self.weights = {name: w for name, w in weights.items() if name.startswith((DIT_PREFIX, SECONDS_PREFIX))}
        self.dit, self.seconds = (
            build_network(
                component,
                layout,
                {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)},
            )
            for component, prefix in ((Component.DIT, DIT_PREFIX), (Component.NUMBER_CONDITIONER, SECONDS_PREFIX))
        )

    def trainable(self) -> dict[str, Tensor]:
        """Return the parameters, with gradients on."""
        learned: dict[str, Tensor] = {
            f"{prefix}{name}": weight
            for network, prefix in ((self.dit, DIT_PREFIX), (self.seconds, SECONDS_PREFIX))
            for name, weight in network.named_parameters()
        }
        for weight in learned.values():
            weight.requires_grad_(True)
        return learned

    def velocity(self, noisy: Tensor, t: Tensor, prompt: Tensor, seconds: Tensor, local: Tensor) -> Tensor:
        """Return the velocity [B, C, T] under a prompt's tokens [B, N, width], seconds [B], local conditioning."""
        duration = self.seconds(seconds)
        mask = torch.ones(len(noisy), noisy.shape[2])
        given = torch.cat((prompt, duration * (prompt.abs().sum((1, 2), keepdim=True) > 0)), dim=1)
        made: Tensor = self.dit(noisy, t, given, duration[:, 0], local, mask)
        return made


def train(
    layout: CheckpointLayout,
    text: Text,
    examples: Examples,
    folder: Path,
    *,
    steps: int,
    few_steps: int,
    seed: int,
    report: Report,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train both forms, or go on; return the weights of the base form and of the one of few steps.

    The second begins as the first, sees the noise levels of its own schedule, and is held to the denoised estimate.
    """
    network = Diffusion(layout, initial(layout, seed))
    training = Training(folder, "diffusion", network.trainable(), steps=steps, rate=_RATE, seed=seed)
    base = network.weights | training.run(lambda drawn: _loss(network, text, examples, drawn, _any_time), report)
    network = Diffusion(layout, {name: tensor.detach().clone() for name, tensor in base.items()})
    learned = network.trainable()
    training = Training(folder, "few-steps", learned, steps=few_steps, rate=_FEW_STEPS_RATE, seed=seed + 1)
    few = training.run(few_steps_loss(network, text, examples), report)
    return base, network.weights | few


def few_steps_loss(network: Diffusion, text: Text, examples: Examples) -> Loss:
    """Return the loss of the denoised estimate at the noise levels of the schedules of few steps."""
    steps = DEFAULTS["rf_denoiser"].steps
    levels = torch.from_numpy(np.concatenate((sigmas(steps)[:-1], sigmas(steps, DEFAULT_INIT_NOISE)[1:-1])))

    def of_schedules(count: int, generator: torch.Generator) -> Tensor:
        return levels[torch.randint(len(levels), (count,), generator=generator)]

    return lambda drawn: _loss(network, text, examples, drawn, of_schedules, estimate=True)


def _any_time(count: int, generator: torch.Generator) -> Tensor:
    """Return times [B], of which half are even and half have an even log-SNR between 2 and -6.2."""
    even = torch.rand(count, generator=generator)
    logsnr = 2 - 8.2 * torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.5, even, torch.sigmoid(-logsnr))


def _loss(
    network: Diffusion,
    text: Text,
    examples: Examples,
    generator: torch.Generator,
    times: Callable[[int, torch.Generator], Tensor],
    *,
    estimate: bool = False,
) -> Tensor:
    """Return the loss of half a batch: of the velocity, or of the denoised estimate, also from another piece."""
    chosen = torch.randint(len(examples.pieces), (_HALF,), generator=generator)
    pieces = [examples.pieces[int(index)] for index in chosen]
    latents = examples.latents[chosen].float()
    random = np.random.default_rng(int(torch.randint(1 << 62, (1,), generator=generator)))
    with torch.no_grad():
        prompt = text.network(*text.tokens([caption(piece, random) for piece in pieces]))
    prompt = prompt * (torch.rand(_HALF, 1, 1, generator=generator) >= _WITHOUT_PROMPT)
    seconds = torch.tensor([piece.seconds for piece in pieces])
    t, begun = times(_HALF, generator)[:, None, None], latents
    if estimate:
        another = torch.rand(_HALF, 1, 1, generator=generator) < _BEGUN
        low, high = _BEGUN_AT
        t = torch.where(another, low + (high - low) * torch.rand(_HALF, 1, 1, generator=generator), t)
        begun = torch.where(another, latents.roll(1, 0), latents)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = (1 - t) * begun + t * noise
    made = network.velocity(noisy, t[:, 0, 0], prompt, seconds, _kept(latents, generator))
    wrong = noisy - t * made - latents if estimate else made - (noise - latents)
    # A soft sound counts as much as a loud one, also beside it.
    energy = _per_sound(latents.pow(2).mean(1), pieces) + (_SOFTEST_ESTIMATE if estimate else _SOFTEST)
    return (wrong.pow(2).mean(1) / energy).mean()


def _kept(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Return local conditioning [B, C + 1, T]: of some examples all but a stretch is given, of the others nothing."""
    count = len(latents)
    ends = torch.randint(LATENTS + 1, (count, 2), generator=generator).sort(1).values
    place = torch.arange(LATENTS)
    keep = (place < ends[:, :1]) | (place >= ends[:, 1:])
    keep &= torch.rand(count, 1, generator=generator) < _INPAINTED
    mask = keep[:, None].float()
    return torch.cat((mask, latents * mask), dim=1)
