"""At the published dimensions the networks have the published tensors, shapes included; no weights are held."""

import json
from pathlib import Path

import pytest
import torch

from sa3_convert.checkpoint.config import TEXT_ENCODER_FOLDER, read_layout
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.published import model_config, text_encoder_config
from sa3_convert.checkpoint.tensors import (
    AUTOENCODER_PREFIX,
    DIT_PREFIX,
    PROMPT_PREFIX,
    SECONDS_PREFIX,
    TEXT_ENCODER_PREFIX,
    expected_tensors,
    expected_text_encoder_tensors,
)
from sa3_convert.checkpoint.variants import variant_named
from sa3_convert.components import Component
from sa3_convert.networks.build import build_network

PREFIXES = {
    Component.TEXT_ENCODER: (PROMPT_PREFIX, TEXT_ENCODER_PREFIX),
    Component.NUMBER_CONDITIONER: (SECONDS_PREFIX,),
    Component.DIT: (DIT_PREFIX,),
    Component.DECODER: (f"{AUTOENCODER_PREFIX}decoder.", f"{AUTOENCODER_PREFIX}bottleneck."),
    Component.ENCODER: (f"{AUTOENCODER_PREFIX}encoder.",),
}


def layout_of_published(name: str, folder: Path) -> CheckpointLayout:
    variant = variant_named(name)
    (folder / TEXT_ENCODER_FOLDER).mkdir()
    (folder / "model_config.json").write_text(json.dumps(model_config(variant, "full")))
    config = json.dumps(text_encoder_config(variant, "full"))
    (folder / TEXT_ENCODER_FOLDER / "config.json").write_text(config)
    return read_layout(folder)


def published_state(layout: CheckpointLayout, component: Component) -> dict[str, torch.Tensor]:
    assert layout.text_encoder is not None
    tensors = expected_tensors(layout) | expected_text_encoder_tensors(layout.text_encoder)
    keep = PREFIXES[component]
    strip = AUTOENCODER_PREFIX if component is Component.DECODER else None
    return {
        name.removeprefix(strip or next(prefix for prefix in keep if name.startswith(prefix))): torch.empty(
            spec.shape, device="meta"
        )
        for name, spec in tensors.items()
        if name.startswith(keep)
    }


@pytest.mark.parametrize("name", ["small-music", "medium"])
@pytest.mark.parametrize("component", list(Component))
def test_the_published_tensors_fit_the_networks(name: str, component: Component, tmp_path: Path) -> None:
    layout = layout_of_published(name, tmp_path)
    state = published_state(layout, component)
    assert build_network(component, layout, state).state_dict().keys() == state.keys()
