"""From a bundle or a checkpoint to an engine with its files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sa3_convert.bundle.manifest import SPLIT_KINDS, TOKENIZER, ArtifactKind
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.config import TEXT_ENCODER_FOLDER
from sa3_convert.components import Component
from sa3_convert.errors import BackendError, BundleError, CheckpointError, UsageError
from sa3_convert.runtime.autoencode import Bottleneck
from sa3_convert.runtime.engines import Engine, EngineName, MnnEngine, OrtEngine, TorchEngine
from sa3_convert.system.checked_files import CheckedFile

KINDS: Mapping[EngineName, ArtifactKind] = {
    "mnn": "mnn",
    "onnxruntime": "onnx",
    "onnxruntime-int8": "onnx-int8",
}


_OPTIONS: Mapping[EngineName, tuple[str, ...]] = {
    "mnn": ("threads", "memory", "precision", "backend", "places", "split"),
    "onnxruntime": ("threads", "backend"),
    "onnxruntime-int8": ("threads", "backend"),
    "torch": ("threads", "padding", "backend", "checkpoint", "loras"),
}


def bundle_engine(bundle: Bundle, name: EngineName, options: Mapping[str, Any], *, check: bool = True) -> Engine:
    """Return an engine over the files of a bundle.

    Args:
        bundle: an open bundle.
        name: "mnn", "onnxruntime", "onnxruntime-int8" or "torch", which runs the checkpoint that the bundle was made
            from.
        options: keyword arguments of the engine; of torch also `checkpoint`, the folder, and `loras`, each as
            FILE[:STRENGTH].
        check: compare the files with the manifest first, once per open bundle; without it they still have to stay
            what they are from now on.

    Raises:
        UsageError: no such engine, an option that it does not have, or torch without a checkpoint.
        BundleError: files are missing or are not what the manifest says.
        CheckpointError: the checkpoint is incomplete, damaged, or not the one that the bundle was made from.
        BackendError: torch is not installed.

    """
    if name not in get_args(EngineName):
        raise UsageError(f"There is no engine {name!r}. There are: {', '.join(get_args(EngineName))}.")
    if unknown := sorted(set(options) - set(_OPTIONS[name])):
        raise UsageError(f"Engine {name} has no option {unknown[0]!r}. It has: {', '.join(_OPTIONS[name])}.")
    if name == "torch":
        return _torch_engine(bundle, options, check=check)
    kind = KINDS[name]
    if check:
        bundle.check((), kinds=())
    files = {
        artifact.component: bundle.checked(artifact.component, kind, contents=check)
        for artifact in bundle.manifest.artifacts
        if artifact.component is not None and artifact.kind == kind
    }
    if name == "mnn":
        settings = dict(options)
        parts = _parts(bundle, check=check) if settings.pop("split", False) else None
        return MnnEngine(bundle.layout, files, parts=parts, **settings)
    if name == "onnxruntime-int8" and not files:
        raise BundleError(
            f"Bundle {bundle.path} has nothing for the engine onnxruntime-int8. Convert again with --with-ort-int8."
        )
    return OrtEngine(bundle.layout, files, quantised=name == "onnxruntime-int8", **options)


def _parts(bundle: Bundle, *, check: bool) -> tuple[CheckedFile, CheckedFile]:
    kinds = {artifact.kind for artifact in bundle.manifest.artifacts}
    if not kinds.issuperset(SPLIT_KINDS):
        raise BundleError(f"Bundle {bundle.path} has no DiT in two parts. Convert again with --with-split-dit.")
    prepare, step = (bundle.checked(Component.DIT, kind, contents=check) for kind in SPLIT_KINDS)
    return prepare, step


def _torch_engine(bundle: Bundle, options: Mapping[str, Any], *, check: bool) -> TorchEngine:
    settings = dict(options)
    folder = settings.pop("checkpoint", None)
    if folder is None:
        raise UsageError("Engine torch runs the checkpoint that the bundle was made from: say where it stands.")
    engine, _, _ = checkpoint_parts(Path(folder), settings)
    if replace(engine.checkpoint.layout, source_id=None) != replace(bundle.layout, source_id=None):
        raise CheckpointError(f"{folder} has other dimensions than {bundle.path} was made from.")
    if check:
        bundle.check((), kinds=())
        for component in bundle.components:
            if engine.checkpoint.digest(component) != bundle.manifest.checkpoint.digests.get(component):
                loras = ", ".join(f"{lora.name}:{lora.strength:g}" for lora in bundle.manifest.loras)
                raise CheckpointError(
                    f"The {component.value} of {folder} is not the one that {bundle.path} was made from. Give that "
                    f"bundle's own checkpoint, and its LoRAs with --lora ({loras or 'it has none'})."
                )
    return engine


def checkpoint_parts(folder: Path, options: Mapping[str, Any]) -> tuple[TorchEngine, Path, Bottleneck]:
    """Return torch engine, tokenizer and bottleneck of a checkpoint folder.

    Raises:
        BackendError: torch is not installed.
        CheckpointError: the checkpoint is incomplete, damaged or not supported.

    """
    try:
        from sa3_convert.checkpoint.lora_file import LoraRequest
        from sa3_convert.checkpoint.reader import Checkpoint
    except ImportError as error:
        raise BackendError(f"torch cannot be imported ({error}). Install it: pip install torch.") from None

    settings = dict(options)
    loras = [LoraRequest.parse(text) for text in settings.pop("loras", ())]
    checkpoint = Checkpoint.open(folder).with_loras(loras)
    state = checkpoint.state(Component.DECODER)
    bottleneck = Bottleneck(
        scaling_factor=state["bottleneck.scaling_factor"].numpy().copy(),
        bias=state["bottleneck.bias"].numpy().copy(),
        running_std=np.float32(state["bottleneck.running_std"].item()),
    )
    return TorchEngine(checkpoint, **settings), folder / TEXT_ENCODER_FOLDER / TOKENIZER, bottleneck
