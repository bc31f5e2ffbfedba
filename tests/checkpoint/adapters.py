"""Toy LoRA adapters: seeded factors for any layers, in the reference's file format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from sa3_convert.checkpoint.lora_file import LORA_TYPES

QKV = "model.transformer.layers.0.self_attn.to_qkv"
CONV = "model.preprocess_conv"
SECONDS = "conditioners.seconds_total.embedder.embedding.1"

Factors = dict[str, NDArray[Any]]


def tensor_name(layer: str) -> str:
    """Return a layer's weight in `model.safetensors`."""
    return ("model." if layer.startswith("model.") else "conditioner.") + layer + ".weight"


def weight_of(checkpoint: Path, layer: str) -> NDArray[np.float32]:
    weight: NDArray[np.float32] = load_file(checkpoint / "model.safetensors")[tensor_name(layer)]
    return weight


def key(layer: str, factor: str) -> str:
    return f"{layer}.parametrizations.weight.0.{factor}"


def toy_factors(kind: str, shape: Sequence[int], rank: int, seed: int = 0) -> Factors:
    """Return factors for a weight of this shape: a step as large as the weight, magnitudes around 1."""
    rng = np.random.default_rng(seed)
    fan_out, fan_in = shape[0], int(np.prod(shape[1:]))
    return {
        name: (
            rng.uniform(0.5, 1.5, size)
            if name.startswith("magnitude")
            else rng.standard_normal(size) / np.sqrt(fan_in if name == "lora_A" else rank)
        ).astype(np.float16)
        for name, size in LORA_TYPES[kind].factors(fan_out, fan_in, rank).items()
    }


def toy_adapter(
    path: Path,
    checkpoint: Path,
    kind: str = "lora",
    layers: Sequence[str] = (QKV, CONV),
    *,
    rank: int = 4,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter for a checkpoint; `config` replaces entries of `lora_config`."""
    tensors = {
        key(layer, name): value
        for number, layer in enumerate(layers)
        for name, value in toy_factors(kind, weight_of(checkpoint, layer).shape, rank, seed + number).items()
    }
    stated = {"rank": rank, "alpha": 2 * rank, "adapter_type": kind, **(config or {})}
    save_file(tensors, path, {"lora_config": json.dumps(stated)})
    return path
