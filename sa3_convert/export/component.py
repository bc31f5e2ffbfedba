"""One component of a checkpoint → its reference ONNX."""

import gc
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_convert.checkpoint.layout import CheckpointLayout
from sa3_convert.components import Component, contract
from sa3_convert.export.onnx import onnx_from_module
from sa3_convert.networks.autoencoder import latents_multiple
from sa3_convert.networks.build import build_network

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint


def export_component(checkpoint: "Checkpoint", component: Component, path: Path) -> None:
    """Export a component to `path` (and `<path>.data`), and let go of its weights.

    Raises:
        UsageError: the checkpoint has no such component.
        LoraError: a weight is not finite with the adapters in it.
        CheckpointError: its weights are missing, damaged, or do not fit its configuration.
        ConversionError: the export failed or failed its checks; nothing is left under the final name.

    """
    ports = contract(component, checkpoint.layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    network = build_network(component, checkpoint.layout, checkpoint.state(component, scratch=path.parent))
    try:
        onnx_from_module(network, ports, path, multiple=_multiple(component, checkpoint.layout))
    finally:
        # What torch traced refers to itself and to the weights; the next component needs the memory.
        del network
        gc.collect()


def _multiple(component: Component, layout: CheckpointLayout) -> int:
    """Return what the number of latents must be a multiple of."""
    halves = {Component.DECODER: layout.autoencoder.decoder, Component.ENCODER: layout.autoencoder.encoder}
    return latents_multiple(halves[component]) if component in halves else 1
