"""States as the networks want them, read from a golden checkpoint by nothing but safetensors."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from sa3_convert.components import Component

_MODEL_PREFIXES = {
    Component.NUMBER_CONDITIONER: ("conditioner.conditioners.seconds_total.",),
    Component.DIT: ("model.model.",),
    Component.DECODER: ("pretransform.model.decoder.", "pretransform.model.bottleneck."),
    Component.ENCODER: ("pretransform.model.encoder.",),
}
_STRIPPED = {Component.DECODER: "pretransform.model."}


def component_state(checkpoint: Path, component: Component) -> dict[str, Tensor]:
    model = load_file(checkpoint / "model.safetensors")
    if component is Component.TEXT_ENCODER:
        encoder = load_file(checkpoint / "t5gemma-b-b-ul2" / "model.safetensors")
        prefix = "model.encoder."
        state = {name.removeprefix(prefix): t.float() for name, t in encoder.items() if name.startswith(prefix)}
        return state | {"padding_embedding": model["conditioner.conditioners.prompt.padding_embedding"]}
    prefixes = _MODEL_PREFIXES[component]
    stripped = _STRIPPED.get(component, prefixes[0])
    return {name.removeprefix(stripped): t for name, t in model.items() if name.startswith(prefixes)}
