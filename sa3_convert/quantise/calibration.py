"""What reaches each linear in use: second moments of its inputs, collected with ONNX Runtime on the reference."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sa3_convert.files import copy_file, partial_folder
from sa3_convert.ort import OrtSession
from sa3_convert.quantise.layers import quantisable_layers
from sa3_convert.quantise.moments import Moments
from sa3_convert.verify.inputs import Sample

_AT_ONCE: Final = 64
"""Activations that are held at the same time."""


def collect_moments(
    reference: Path, samples: Iterable[Sample], *, threads: int | None = None, tick: Callable[[], None] | None = None
) -> Moments:
    """Run the reference and sum up x·xᵀ for the input of every linear.

    Args:
        reference: fp32 ONNX.
        samples: calibration inputs; positions that are not judged (padding) are left out.
        threads: for ONNX Runtime.
        tick: called after each run.

    Returns:
        Moments by layer name. Convolutions with a kernel have none.

    """
    model = ir.load(reference)
    users: dict[str, list[str]] = defaultdict(list)
    for layer in quantisable_layers(model):
        if layer.is_linear:
            users[layer.input_name].append(layer.name)
    sums: dict[str, NDArray[np.float32]] = {}
    materialised = list(samples)
    names = list(users)
    for start in range(0, len(names), _AT_ONCE):
        chosen = names[start : start + _AT_ONCE]
        with partial_folder(reference) as folder:
            session = OrtSession(_with_outputs(reference, chosen, folder), threads=threads, outputs=chosen)
            for sample in materialised:
                for name, activation in session.run(sample.feeds).items():
                    rows = _rows(activation, sample)
                    sums[name] = sums.get(name, 0) + rows.T @ rows
                if tick is not None:
                    tick()
    return {layer: sums[name] for name, layers in users.items() for layer in layers}


def _rows(activation: NDArray[np.float32], sample: Sample) -> NDArray[np.float32]:
    """Return [positions, channels]; of a sequence as long as the output, only the positions that are judged."""
    valid = sample.regions[0].stop
    if valid is not None and activation.ndim == 3:
        # Tokens in front of the sequence (the DiT's memory) always count.
        extra = activation.shape[1] - next(iter(sample.feeds.values())).shape[-1]
        if extra >= 0:
            activation = activation[:, : extra + valid]
    return activation.reshape(-1, activation.shape[-1])


def _with_outputs(reference: Path, names: list[str], folder: Path) -> Path:
    """Write a copy of the graph, not of its weights, with more outputs."""
    model = ir.load(reference)
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in model.graph.inputs}
    present = {value.name for value in model.graph.outputs}
    for name in names:
        if name not in present:
            value = values[name]
            value.dtype = value.dtype or ir.DataType.FLOAT
            model.graph.outputs.append(value)
    target = folder / reference.name
    data = reference.with_name(f"{reference.name}.data")
    if data.exists():
        # ONNX Runtime refuses links that lead out of the model's folder.
        copy_file(data, folder / data.name)
    ir.save(model, target)
    return target
