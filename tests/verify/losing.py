"""Bundles that lost a little: valid files whose weights are rounded a little worse than they were."""

import json
from pathlib import Path

import numpy as np

from sa3_convert.bundle.manifest import Bundle, FileEntry
from sa3_convert.components import Component
from sa3_convert.mnn.storage import read_storage
from sa3_convert.verify.component import verify_files


def share_for(loss_db: float) -> float:
    """Return the share of codes to move by one: rounding makes an error of 1/12 of a step squared, a move 1 of it."""
    return float(10 ** (loss_db / 10) - 1) / 12


def round_worse(model: Path, loss_db: float, seed: int = 0) -> None:
    """Move some codes of every INT8 weight of a `.mnn` to a neighbour, so that the weights' error grows by `loss_db`."""
    data = np.frombuffer(model.read_bytes(), np.uint8).copy()
    random = np.random.default_rng(seed)
    for _, weight in read_storage(model).weighted():
        if weight.bits != 8:
            continue
        end = weight.payload.offset + weight.payload.bytes
        # A payload begins with its shape and its code book; the codes themselves come last.
        codes = data[end - weight.elements : end]
        inner = np.flatnonzero((codes > codes.min()) & (codes < codes.max()))
        moved = random.choice(inner, round(share_for(loss_db) * codes.size), replace=False)
        codes[moved] += random.choice(np.array([1, 255], np.uint8), moved.size)
    model.unlink()  # it may be a hard link to the stage cache
    model.write_bytes(data.tobytes())


def lose(bundle: Path, component: Component, loss_db: float) -> Bundle:
    """Make one model of a bundle worse, with a manifest that tells the truth about the worse file."""
    opened = Bundle.open(bundle)
    model = opened.file(component)
    round_worse(model, loss_db)
    worst = verify_files(opened.file(component, "onnx"), model, component, opened.layout, quick=True, threads=1).worst
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    for artifact in manifest["artifacts"]:
        if artifact["component"] == component and artifact["kind"] == "mnn":
            artifact.update(FileEntry.of(bundle, artifact["path"]).model_dump())
            artifact["fidelity"] = {
                "signal_to_noise_db": worst.signal_to_noise_db,
                "cosine": worst.cosine,
                "max_abs_error": worst.max_abs_error,
            }
    path.write_text(json.dumps(manifest))
    return Bundle.open(bundle)
