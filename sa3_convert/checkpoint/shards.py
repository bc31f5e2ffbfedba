"""Weights in several files: an index says which tensor stands in which. It is believed only where the files agree.

The layout is that of the Hugging Face libraries: `model.safetensors.index.json` holds `weight_map`, tensor → name of a
file beside it (`model-00001-of-00003.safetensors`). Links are followed, as the hub's cache consists of them.
"""

import re
from pathlib import Path
from typing import Final

from sa3_convert.checkpoint.section import Section, read_json, shown
from sa3_convert.errors import CheckpointError

WEIGHTS: Final = "model.safetensors"
INDEX: Final = f"{WEIGHTS}.index.json"

_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}\.safetensors")
_MOST: Final = 1000
"""Shards; the largest published models have some hundred."""


def read_index(index: Path) -> dict[str, str]:
    """Return the name of the file that holds a tensor, by tensor.

    Raises:
        CheckpointError: it is no index, or names what cannot be a file beside it; the message says what.

    """
    where = Section(read_json(index), str(index))
    placed = where.raw("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index}: weight_map is {shown(placed)}, expected an object, tensor → file.")
    for name in placed.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"{index} names {shown(name)} as a file of weights; only .safetensors files beside it are read."
            )
    if len(set(placed.values())) > _MOST:
        raise CheckpointError(f"{index} names more than {_MOST} files.")
    return placed


def shard_names(index: Path) -> tuple[str, ...]:
    """Return the files beside an index that it needs, sorted; `checkpoint fetch` asks for these.

    Raises:
        CheckpointError: see `read_index`.

    """
    return tuple(sorted(set(read_index(index).values())))
