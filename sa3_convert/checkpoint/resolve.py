"""From what a user writes to a checkpoint's folder: a path, or a hub id that is in the local cache. No network."""

import re
from pathlib import Path

from sa3_convert.checkpoint.hub_files import CachedSnapshot, cached_commit
from sa3_convert.checkpoint.variants import VARIANTS
from sa3_convert.errors import CheckpointError

_REFERENCE = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def resolve_checkpoint(text: str) -> Path:
    """Return the folder of a checkpoint.

    Args:
        text: an existing path, or `org/name[@revision]` as fetched into the Hugging Face cache before. Without a
            revision the pinned one of a published variant is taken if it is there, else what `main` was when fetched.

    Raises:
        CheckpointError: there is no such path and no such cached checkpoint; the message says how to get it. Or a file
            in the cache is not what its blob's name says.

    """
    path = Path(text).expanduser()
    if text and path.exists():
        return path
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise CheckpointError(f"Checkpoint {text!r} does not exist.{_hint(text)}")
    hub_id, revision = match["id"], match["revision"]
    pinned = next((variant.revision for variant in VARIANTS.values() if variant.hub_id == hub_id), None)
    candidates = [revision] if revision else [pinned, "main"]
    for candidate in filter(None, candidates):
        folder = _cached(hub_id, candidate)
        if folder is not None:
            return folder
    where = f" at revision {revision}" if revision else ""
    raise CheckpointError(
        f"{text} is neither a folder nor a checkpoint in the local Hugging Face cache{where}. "
        f"Download it: sa3-convert checkpoint fetch {hub_id} DIR{f' --revision {revision}' if revision else ''}"
    )


def _hint(text: str) -> str:
    variant = VARIANTS.get(text)
    if variant is None:
        return " Give the folder that holds model_config.json and model.safetensors, or a hub id (org/name)."
    return (
        f" To try that variant with random weights: sa3-convert checkpoint synthesize DIR --variant {text}. "
        f"To download it: sa3-convert checkpoint fetch {variant.hub_id} DIR"
    )


def _cached(hub_id: str, revision: str) -> Path | None:
    """Return a snapshot of the cache, whose files are what their blobs' names say."""
    commit = cached_commit(hub_id, revision)
    if commit is None:
        return None
    snapshot = CachedSnapshot(hub_id, commit)
    if "model_config.json" not in snapshot:
        return None
    for damaged in snapshot.damaged():
        raise CheckpointError(
            f"{damaged} is damaged: its content is not what its name in the cache says. Remove it, and download it "
            f"again: sa3-convert checkpoint fetch {hub_id} DIR --revision {commit}"
        )
    return snapshot.folder
