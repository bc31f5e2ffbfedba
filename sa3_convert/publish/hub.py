"""Bundles published on the hub: the export's tree in one commit, then held to what the hub lists of that commit.

The upload is the hub library's. Nothing of its messages or of the hub's is repeated: they may quote what was sent, the
token among it.
"""

import hashlib
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final

import numpy as np

from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.tensors import SEEDED_DEVIATION
from sa3_convert.checkpoint.variants import size_of
from sa3_convert.errors import HubError, UsageError
from sa3_convert.hub.client import HubClient, Note
from sa3_convert.hub.files import HubFile, HubId
from sa3_convert.publish.export import Export
from sa3_convert.runtime.autoencode import Bottleneck

_ALLOWED: Final = ("synthetic", "lora")
"""What is published only when it is asked for."""
_BUSY: Final = (408, 425, 429, 500, 502, 503, 504)
_SHOWN: Final = 10
_AGAIN: Final = "What was uploaded is kept there; run the same command again to go on."


def is_synthetic(bundle: Bundle) -> bool:
    """Tell whether a bundle's weights are random, by what it says or by a deviation that no training ends with."""
    if bundle.manifest.checkpoint.synthetic or size_of(bundle.layout) == "toy":
        return True
    with bundle.reading("bottleneck_params") as file:
        bottleneck = Bottleneck.read(file, bundle.layout.autoencoder.latent_dim)
    return bool(bottleneck.running_std == np.float32(SEEDED_DEVIATION))


def require_publishable(bundles: Sequence[Bundle], allow: Collection[str]) -> None:
    """Refuse what is not meant to be handed to everybody.

    Raises:
        UsageError: a bundle's weights are seeded or have a LoRA in them, and that is not allowed; or nobody has ever
            verified it.
        BundleError: it is damaged.

    """
    if unknown := sorted(set(allow) - set(_ALLOWED)):
        raise UsageError(f"--allow {unknown[0]} is none of {', '.join(_ALLOWED)}.")
    for bundle in bundles:
        if bundle.is_foreign:
            raise UsageError(f"{bundle.path} has no manifest: nobody has verified its models. Convert them yourself.")
        if "synthetic" not in allow and is_synthetic(bundle):
            raise UsageError(
                f"{bundle.path} holds random weights, which make noise. To publish them all the same, add "
                "--allow synthetic."
            )
        if "lora" not in allow and bundle.manifest.loras:
            names = ", ".join(lora.label for lora in bundle.manifest.loras)
            raise UsageError(
                f"{bundle.path} has LoRAs in its weights: {names}. If their licences let you publish them, add "
                "--allow lora."
            )


def bars(*, shown: bool) -> AbstractContextManager[object]:
    """Return what keeps the library's progress bars from being shown within a block, unless they are wanted."""
    from huggingface_hub.utils import disable_progress_bars

    return nullcontext() if shown else disable_progress_bars()


def publish(
    export: Export, hub_id: str, *, private: bool = False, create_pr: bool = False, endpoint: str | None = None
) -> tuple[HubId, int | None]:
    """Upload a planned export in one commit; return its id with that commit, and the number of the pull request.

    Files that the hub already has are not uploaded again.

    Args:
        export: of the layout of the hub.
        hub_id: `ORG/NAME`; it is made if it is not there.
        private: make it a private one; one that is there has to be private.
        create_pr: as a pull request, to a repository that is there.
        endpoint: address of the hub; by default what HF_ENDPOINT says.

    Raises:
        UsageError: it is no id of a repository.
        HubError: the hub refuses or cannot be reached, or it is public and was to be private.

    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=endpoint)
    operations = [CommitOperationAdd(path, source) for path, source in _contents(export).items()]
    try:
        if not create_pr:
            api.create_repo(hub_id, private=private or None, exist_ok=True)
        is_public = private and not api.model_info(hub_id).private
        if not is_public:
            bundles = [path.rpartition("/")[0] for path in export.texts if path.endswith("/manifest.json")]
            message = f"Publish {', '.join(sorted(bundles))}"
            commit = api.create_commit(hub_id, operations, commit_message=message, create_pr=create_pr)
    except Exception as error:
        raise _refusal(hub_id, error) from None
    if is_public:
        raise HubError(
            f"{hub_id} is there and is public. Nothing was published. Leave --private out, or take another id."
        )
    pinned = HubId.parse(f"{hub_id}@{commit.oid}")
    if pinned is None:
        raise HubError(f"The hub names no commit for what was published to {hub_id}. Look there before you go on.")
    return pinned, int(commit.pr_num) if create_pr and commit.pr_num else None


def check_published(export: Export, pinned: HubId, note: Note, endpoint: str | None = None) -> None:
    """List a published commit again, and hold each file's size and hash to what was meant.

    Raises:
        HubError: one is not there or is another; the message names it.

    """
    assert pinned.revision is not None
    listing = HubClient(pinned.repository, endpoint, note).listing(pinned.revision)
    wrong = [
        path
        for path, content in _contents(export).items()
        if path not in listing or not _is_listed(listing.file(path), content, export)
    ]
    if listing.commit != pinned.revision or wrong:
        named = ", ".join(wrong[:_SHOWN]) or "its commit"
        raise HubError(
            f"{pinned} is not what was to be published: the hub lists something else, or nothing, for {named}. Do not "
            "hand it on. Publish again, and compare."
        )


def _contents(export: Export) -> dict[str, Path | bytes]:
    return {path: source for path, (source, _) in export.files.items()} | dict(export.texts)


def _is_listed(file: HubFile, content: Path | bytes, export: Export) -> bool:
    """Tell whether the hub has what was meant: by SHA-256, of small files by git's hash of their content."""
    if len(file.digest) == 64:
        if isinstance(content, bytes):
            return (file.size, file.digest) == (len(content), hashlib.sha256(content).hexdigest())
        _, entry = export.files[file.name]
        return (file.size, file.digest) == (entry.bytes, entry.sha256)
    if isinstance(content, Path):
        _, entry = export.files[file.name]
        return HubFile(file.name, entry.bytes, entry.sha256).is_at(content) and file.is_at(content)
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return (file.size, file.digest) == (len(content), blob)


def _refusal(hub_id: str, error: BaseException) -> HubError:
    """Say in our own words why the library gave up."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    found = (getattr(getattr(cause, "response", None), "status_code", None) for cause in causes)
    status = next(filter(None, found), None)
    if status is None:
        return HubError(
            f"Publishing {hub_id} failed ({type(error).__name__}). Check the network and HF_TOKEN. {_AGAIN}"
        )
    if status in _BUSY:
        return HubError(f"The hub is busy (status {status}). {_AGAIN}")
    if status in (401, 403):
        return HubError(
            f"The hub lets nobody write to {hub_id} with this token, or there is none (status {status}). Log in with "
            "`hf auth login`, with a token that may write there."
        )
    if status == 404:
        return HubError(f"The hub has no {hub_id}, or hides it from you. Check the id, or leave --create-pr out.")
    return HubError(f"The hub refused what was to be published to {hub_id} (status {status}). {_AGAIN}")
