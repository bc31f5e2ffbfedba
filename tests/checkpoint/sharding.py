"""Split a folder's weights as the Hugging Face libraries do."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shard(folder: Path, count: int = 3) -> list[str]:
    """Replace `model.safetensors` by shards and their index; return the shards' names."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    placed = {}
    for number, name in enumerate(names):
        part = dict(list(tensors.items())[number::count])
        save_file(part, folder / name, {"format": "pt"})
        placed |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_index(folder, {"metadata": {"total_size": total}, "weight_map": placed})
    return names


def read_index(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return data


def write_index(folder: Path, data: object) -> None:
    (folder / INDEX).write_text(json.dumps(data))
