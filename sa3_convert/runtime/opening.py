"""From a bundle or a checkpoint to an engine with its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sa3_convert.bundle.manifest import TOKENIZER, ArtifactKind, Bundle
from sa3_convert.checkpoint.layout import TEXT_ENCODER_FOLDER
from sa3_convert.components import Component
from sa3_convert.errors import BackendError, BundleError, UsageError
from sa3_convert.runtime.bottleneck import Bottleneck
from sa3_convert.runtime.engines import Engine, EngineName, MnnEngine, OrtEngine, TorchEngine

KINDS: Mapping[EngineName, ArtifactKind] = {
    "mnn": "mnn",
    "onnxruntime": "onnx",
    "onnxruntime-int8": "onnx-int8",
}


def bundle_engine(bundle: Bundle, name: EngineName, options: Mapping[str, Any], *, check: bool = True) -> Engine:
    """Return an engine over the files of a bundle.

    Args:
        bundle: an open bundle.
        name: "mnn", "onnxruntime" or "onnxruntime-int8"; torch runs a checkpoint, see `checkpoint_parts`.
        options: keyword arguments of the engine.
        check: compare the files with the manifest first.

    Raises:
        UsageError: no such engine, or one that does not run bundles.
        BundleError: files are missing or are not what the manifest says.

    """
    kind = KINDS.get(name)
    if kind is None:
        known = ", ".join(get_args(EngineName))
        raise UsageError(
            "The torch engine runs a checkpoint, not a bundle."
            if name == "torch"
            else f"There is no engine {name!r}. There are: {known}."
        )
    files = {
        artifact.component: bundle.file(artifact.component, kind)
        for artifact in bundle.manifest.artifacts
        if artifact.component is not None and artifact.kind == kind
    }
    if check:
        bundle.check(tuple(files), kinds=(kind,))
    if name == "mnn":
        return MnnEngine(bundle.layout, files, **options)
    if name == "onnxruntime-int8":
        if not files:
            raise BundleError(
                f"Bundle {bundle.path} has nothing for the engine onnxruntime-int8. Convert again with --with-ort-int8."
            )
        return OrtEngine(files, quantised=True, **options)
    return OrtEngine(files, **options)


def checkpoint_parts(folder: Path, options: Mapping[str, Any]) -> tuple[TorchEngine, Path, Bottleneck]:
    """Return torch engine, tokenizer and bottleneck of a checkpoint folder.

    Raises:
        BackendError: torch is not installed.
        CheckpointError: the checkpoint is incomplete, damaged or not supported.

    """
    try:
        from sa3_convert.checkpoint.reader import Checkpoint
    except ImportError as error:
        raise BackendError(f"torch cannot be imported ({error}). Install it: pip install torch.") from None

    checkpoint = Checkpoint.open(folder)
    state = checkpoint.state(Component.DECODER)
    bottleneck = Bottleneck(
        scaling_factor=state["bottleneck.scaling_factor"].numpy().copy(),
        bias=state["bottleneck.bias"].numpy().copy(),
        running_std=np.float32(state["bottleneck.running_std"].item()),
    )
    return TorchEngine(checkpoint, **options), folder / TEXT_ENCODER_FOLDER / TOKENIZER, bottleneck
