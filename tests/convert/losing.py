"""Bundles that lost a little: valid files whose weights are rounded a little worse than they were."""

import json
from functools import partial
from pathlib import Path

import numpy as np

from sa3_convert.bundle.manifest import FileEntry
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.compare import verify_sessions
from sa3_convert.check.inputs import samples_for
from sa3_convert.check.results import ComponentFidelity
from sa3_convert.components import Component, contract
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.mnn.session import MnnSession
from sa3_convert.ort import OrtSession

_ROUNDING = 1 / 12
"""Of a step squared: the error that rounding makes; a code that is moved by one makes an error of 1."""


def round_worse(model: bytes, file: Path, share: float) -> None:
    """Write a `.mnn` in which a share of the codes of every INT8 weight stands one off; always the same ones first."""
    data = np.frombuffer(model, np.uint8).copy()
    random = np.random.default_rng(0)
    for _, weight in read_storage(file).weighted():
        if weight.bits != 8:
            continue
        end = weight.payload.offset + weight.payload.bytes
        # A payload begins with its shape and its code book; the codes themselves come last.
        codes = data[end - weight.elements : end]
        inner = random.permutation(np.flatnonzero((codes > codes.min()) & (codes < codes.max())))
        moved = inner[: round(share * codes.size)]
        codes[moved] += random.choice(np.array([1, 255], np.uint8), inner.size)[: moved.size]
    file.unlink()  # it may be a hard link to the stage cache
    file.write_bytes(data.tobytes())


def lose(folder: Path, component: Component, loss_db: float) -> Bundle:
    """Make one model of a bundle worse by `loss_db` on average, its manifest telling the truth about the worse file."""
    bundle = Bundle.open(folder)
    file = bundle.file(component)
    model = file.read_bytes()
    outputs = [port.name for port in contract(component, bundle.layout).outputs]
    samples = samples_for(component, bundle.layout, quick=True)

    def fidelity() -> ComponentFidelity:
        reference = partial(OrtSession, bundle.file(component, "onnx"), threads=1)
        target = partial(MnnSession, file, outputs=outputs, threads=1)
        return verify_sessions(reference, target, component, bundle.layout, samples)

    before, wanted = fidelity(), 10 ** (loss_db / 10) - 1
    share = wanted * _ROUNDING
    for _ in range(8):
        round_worse(model, file, share)
        after = fidelity()
        lost = before.mean.signal_to_noise_db - after.mean.signal_to_noise_db
        if abs(lost - loss_db) < 0.1 * loss_db:
            break
        share *= float(np.clip(wanted / max(10 ** (lost / 10) - 1, 1e-3), 0.3, 3))  # errors add up in power
    else:
        raise AssertionError(f"{component.value}: {lost:.2f} dB lost instead of {loss_db:g}")
    _describe(folder, component, after)
    return Bundle.open(folder)


def _describe(folder: Path, component: Component, fidelity: ComponentFidelity) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for artifact in manifest["artifacts"]:
        if artifact["component"] == component and artifact["kind"] == "mnn":
            artifact.update(FileEntry.of(folder, artifact["path"]).model_dump())
            names = ("signal_to_noise_db", "cosine", "max_abs_error")
            artifact["fidelity"] = {name: getattr(fidelity.worst, name) for name in names}
    path.write_text(json.dumps(manifest))
