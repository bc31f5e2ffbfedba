"""Training of the text encoder: every token that it gives is to say all that a caption says of the sounds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, get_args

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.synthetic import trained_tokenizer
from sa3_convert.checkpoint.tensors import PROMPT_PREFIX, TEXT_ENCODER_PREFIX
from sa3_convert.components import Component
from sa3_convert.lab.miniature.captions import caption
from sa3_convert.lab.miniature.model import MAX_LENGTH, TEXT_WIDTH, VOCABULARY, initial
from sa3_convert.lab.miniature.sounds import (
    NOTES,
    TEMPI,
    Chord,
    Envelope,
    Hit,
    Kind,
    Level,
    Motion,
    Noise,
    Piece,
    Side,
    Sound,
    Wave,
    sampled,
)
from sa3_convert.lab.miniature.training import Report, Training
from sa3_convert.networks.build import build_network

_HALF: Final = 32
_RATE: Final = 2e-3
_CAPTIONS: Final = 6000
"""That the tokenizer is learned from."""
_FORMS: Final = tuple(form for forms in (Wave, Chord, Hit, Noise, Motion) for form in get_args(forms))
_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "kind": get_args(Kind),
    "form": ("", *_FORMS),
    "note": (None, *NOTES),
    "envelope": get_args(Envelope),
    "bpm": (None, *TEMPI),
    "side": get_args(Side),
    "level": get_args(Level),
}
_ANSWERS: Final = sum(len(values) + 1 for values in _VALUES.values())
"""Of one sound; each part has one more for a sound that is not there."""


def tokenizer_file(seed: int) -> str:
    """Return the contents of `tokenizer.json`, learned from captions."""
    random = np.random.default_rng(seed)
    captions = [caption(sampled(random), random) for _ in range(_CAPTIONS)]
    return trained_tokenizer(captions, VOCABULARY, longest=16, words=True)


class Text:
    """The text encoder around one set of weights, and its tokenizer."""

    def __init__(self, layout: CheckpointLayout, weights: Mapping[str, Tensor], tokenizer: str) -> None:
        self.weights = {
            name: tensor for name, tensor in weights.items() if name.startswith((TEXT_ENCODER_PREFIX, PROMPT_PREFIX))
        }
        state = {
            name.removeprefix(TEXT_ENCODER_PREFIX).removeprefix(PROMPT_PREFIX): tensor
            for name, tensor in self.weights.items()
        }
        self.network = build_network(Component.TEXT_ENCODER, layout, state)
        self._tokenizer = Tokenizer.from_str(tokenizer)

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, [B, `MAX_LENGTH`] each."""
        ids, mask = (torch.zeros(len(captions), MAX_LENGTH, dtype=torch.int32) for _ in range(2))
        for row, encoding in enumerate(self._tokenizer.encode_batch(list(captions))):
            found = encoding.ids[:MAX_LENGTH]
            ids[row, : len(found)] = torch.tensor(found, dtype=torch.int32)
            mask[row, : len(found)] = 1
        return ids, mask


def train(
    layout: CheckpointLayout, tokenizer: str, folder: Path, *, steps: int, seed: int, report: Report
) -> dict[str, Tensor]:
    """Train, or go on training, and return the weights by their names in a checkpoint."""
    text = Text(layout, initial(layout, seed), tokenizer)
    network = text.network.train().requires_grad_(True)
    heads = nn.Linear(TEXT_WIDTH, 2 * _ANSWERS)
    nn.init.normal_(heads.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(heads.bias)
    learned = {name: weight for name, weight in network.named_parameters() if name != "padding_embedding"}
    learned |= {f"heads.{name}": weight for name, weight in heads.named_parameters()}

    def loss(generator: torch.Generator) -> Tensor:
        random = np.random.default_rng(int(torch.randint(1 << 62, (1,), generator=generator)))
        pieces = [sampled(random) for _ in range(_HALF)]
        ids, mask = text.tokens([caption(piece, random) for piece in pieces])
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        return _misread(heads(network(ids, mask)), mask, answers(pieces))

    made = Training(folder, "text", learned, steps=steps, rate=_RATE, seed=seed).run(loss, report)
    names = {name.removeprefix(TEXT_ENCODER_PREFIX): name for name in text.weights}
    return text.weights | {names[name]: tensor for name, tensor in made.items() if name in names}


def answers(pieces: Sequence[Piece]) -> Tensor:
    """Return what is to be read out of each caption [B, 2 · parts], as indices."""
    rows = []
    for piece in pieces:
        sounds: list[Sound | None] = [*piece.sounds, None][:2]
        rows.append(
            [
                len(values) if sound is None else values.index(getattr(sound, part))
                for sound in sounds
                for part, values in _VALUES.items()
            ]
        )
    return torch.tensor(rows)


def _misread(logits: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean cross entropy of all parts at all tokens."""
    total = torch.zeros(())
    sizes = [len(values) + 1 for values in _VALUES.values()] * 2
    valid = mask.flatten() > 0
    for part, chosen in enumerate(torch.split(logits.flatten(0, 1)[valid], sizes, dim=-1)):
        repeated = wanted[:, part, None].expand(-1, mask.shape[1]).flatten()[valid]
        total = total + F.cross_entropy(chosen, repeated)
    return total / len(sizes)
