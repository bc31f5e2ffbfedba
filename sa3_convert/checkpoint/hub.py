"""Download a published checkpoint at one commit: only the files that are needed, resumable, placed when complete."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sa3_convert.checkpoint.config import CONFIG, TEXT_ENCODER_FOLDER
from sa3_convert.checkpoint.json_file import read_json
from sa3_convert.checkpoint.reader import SOURCE, TOKENIZER, Checkpoint
from sa3_convert.checkpoint.tensor_file import INDEX, WEIGHTS, shard_names
from sa3_convert.checkpoint.variants import MINIATURE, PINNED
from sa3_convert.errors import UsageError
from sa3_convert.hub.client import HubClient, Note
from sa3_convert.hub.download import Download, Progress, explained, source_of
from sa3_convert.hub.files import download_folder, is_repository, tidy
from sa3_convert.system.files import check_new_folder, sha256_file, take_name, write_text

_OURS = re.compile(
    rf"{TEXT_ENCODER_FOLDER}/|({TEXT_ENCODER_FOLDER}/)?[\w.-]+\.(json|safetensors)|[0-9a-f]+\.partial", re.ASCII
)
"""What a download may have left that can be gone on with."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was downloaded."""

    hub_id: str
    revision: str
    """The commit."""
    nbytes: int


def fetch(
    hub_id: str,
    folder: Path,
    revision: str | None = None,
    progress: Progress | None = None,
    note: Note = lambda _: None,
    *,
    endpoint: str | None = None,
) -> Fetched:
    """Download a checkpoint into `folder`, which takes its name only when every file is there and checked.

    Files that the local Hugging Face cache has at the same commit are taken from there.

    Args:
        hub_id: `org/name`.
        folder: must not exist or be empty. After an interruption the same call goes on where it stopped.
        revision: commit, branch or tag; by default the pinned commit of a published variant, else `main`. The commit
            that it stands for is recorded in `source.json`.
        progress: told about bytes.
        note: told in words what happens meanwhile.
        endpoint: address of the hub; by default what HF_ENDPOINT says.

    Raises:
        UsageError: the id is malformed or the miniature's, the folder is not empty, the disk is too small, or another
            process downloads to the same folder.
        HubError: the hub cannot be reached, refuses, or lacks a file; or what came is not what the hub names.
        CheckpointError: it is not a sound checkpoint.

    """
    if not is_repository(hub_id):
        raise UsageError(f"{hub_id!r} is no hub id; give org/name, for example stabilityai/stable-audio-3-small-music.")
    if hub_id == MINIATURE:
        raise UsageError(f"{hub_id} comes with this package. Name it where a checkpoint is named: convert {hub_id}")
    client = HubClient(hub_id, endpoint, note)
    with explained(hub_id):
        target = Path(os.path.realpath(folder))
        check_new_folder(target)
        source = source_of(client, hub_id, revision or PINNED.get(hub_id, "main"))
        with download_folder(target) as staging:
            check_new_folder(target)
            download = _Download(client, source, staging, note)
            download.bring_all(progress)
            download.record()
            Checkpoint.open(staging)
            take_name(staging, target)
    return Fetched(hub_id, source.commit, sum(file.size for file in download.files))


class _Download(Download):
    """The files of a checkpoint, brought into one folder."""

    def bring_all(self, progress: Progress | None) -> None:
        """Bring every file that the checkpoint needs; nothing else is left in the folder."""
        tidy(self._folder, lambda name: _OURS.fullmatch(name) is not None)
        self.bring([CONFIG])
        config = read_json(self._folder / CONFIG)
        names = self._weights("")
        if not (isinstance(config, dict) and config.get("model_type") == "autoencoder"):
            within = f"{TEXT_ENCODER_FOLDER}/"
            names += [f"{within}config.json", f"{within}{TOKENIZER}", *self._weights(within)]
        kept = {*names, *(file.name for file in self.files)}
        kept |= {f"{Path(name).parent}/" for name in kept if "/" in name}
        kept |= {self.partial(self.source.file(name)).name for name in names}
        tidy(self._folder, kept.__contains__)
        self.bring(names, progress)

    def record(self) -> None:
        """Write down where the files are from and what they are."""
        files = {
            file.name: {
                "sha256": file.digest if len(file.digest) == 64 else sha256_file(self._folder / file.name),
                "bytes": file.size,
            }
            for file in self.files
        }
        source = {"hub_id": self.source.hub_id, "revision": self.source.commit, "files": files}
        write_text(self._folder / SOURCE, json.dumps(source, indent=1) + "\n")

    def _weights(self, within: str) -> list[str]:
        """Return the names of the files that hold a folder's weights; their index is here already if they have one."""
        if f"{within}{WEIGHTS}" in self.source or f"{within}{INDEX}" not in self.source:
            return [f"{within}{WEIGHTS}"]
        self.bring([f"{within}{INDEX}"])
        return [f"{within}{name}" for name in shard_names(self._folder / within / INDEX)]
