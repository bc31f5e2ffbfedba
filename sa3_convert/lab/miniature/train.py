"""The whole training of the miniature: text encoder, autoencoder, DiT; each goes on from where it was stopped."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from sa3_convert.checkpoint.config import CONFIG, TEXT_ENCODER_FOLDER
from sa3_convert.checkpoint.reader import TOKENIZER
from sa3_convert.checkpoint.synthetic import TOKENIZER_CONFIG
from sa3_convert.checkpoint.tensor_file import WEIGHTS
from sa3_convert.checkpoint.tensors import AUTOENCODER_PREFIX, TEXT_ENCODER_PREFIX
from sa3_convert.lab.miniature import autoencoder, diffusion, text
from sa3_convert.lab.miniature.adapter import train_adapter
from sa3_convert.lab.miniature.model import config, layout, text_config
from sa3_convert.lab.miniature.training import Report
from sa3_convert.system.files import alone_in, atomic_folder

FEW_STEPS, BASE, STATE = "miniature", "miniature-base", "training"
"""Folders that a training leaves: the form for few steps, the base form, and what a stopped one goes on from."""
ADAPTER: Final = "diminished.safetensors"
"""The LoRA that it leaves, for the form for few steps."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How long each part is trained, in steps, and how many pieces the DiT sees."""

    text: int
    diffusion: int
    few_steps: int
    adapter: int
    pieces: int


WHOLE: Final = Amount(text=1200, diffusion=9000, few_steps=13000, adapter=600, pieces=40000)
QUICK: Final = Amount(text=20, diffusion=24, few_steps=2, adapter=4, pieces=32)


def train(folder: Path, amount: Amount, *, seed: int, report: Report) -> None:
    """Train, or go on, and write both forms as checkpoints of the published format into `folder`, and the adapter.

    Raises:
        UsageError: another training works in the folder, or something else stands there.

    """
    state = folder / STATE
    state.mkdir(parents=True, exist_ok=True)
    with alone_in(state):
        torch.set_num_threads(1)
        shape = layout()
        tokenizer = text.tokenizer_file(seed)
        words = text.train(shape, tokenizer, state, steps=amount.text, seed=seed, report=report)
        sounds = autoencoder.fitted(shape, seed)
        codec = autoencoder.Autoencoder(shape, sounds)
        examples = diffusion.Examples.of(codec, state / "latents.safetensors", amount.pieces, seed, report)
        reader = text.Text(shape, words, tokenizer)
        steps = {"steps": amount.diffusion, "few_steps": amount.few_steps}
        base, few = diffusion.train(shape, reader, examples, state, **steps, seed=seed, report=report)
        shared = {AUTOENCODER_PREFIX + name: tensor for name, tensor in sounds.items()} | words
        for name, flow in ((BASE, base), (FEW_STEPS, few)):
            with atomic_folder(folder / name, replace=True) as partial:
                write(partial, shared | flow, tokenizer, base=name == BASE)
        new = folder / ADAPTER
        train_adapter(shape, few, reader, codec, new, state=state, steps=amount.adapter, seed=seed, report=report)


def write(folder: Path, weights: Mapping[str, Tensor], tokenizer: str, *, base: bool) -> None:
    """Write a checkpoint of all weights, by their names in one, in float16."""
    halves = {name: tensor.detach().half().contiguous() for name, tensor in sorted(weights.items())}
    text_folder = folder / TEXT_ENCODER_FOLDER
    text_folder.mkdir()
    read = {name: half for name, half in halves.items() if name.startswith(TEXT_ENCODER_PREFIX)}
    save_file(read, text_folder / WEIGHTS, {"format": "pt"})
    save_file({name: half for name, half in halves.items() if name not in read}, folder / WEIGHTS)
    for path, data in (
        (folder / CONFIG, config(base=base)),
        (text_folder / "config.json", text_config()),
        (text_folder / "tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (text_folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
