"""The five components: names, I/O contract, file names. The one table that everything else reads.

Names and shapes are what existing clients call (they resize by input name and fetch outputs by name), so they are part
of the product's contract. T, the number of latents, is the only dynamic length.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal

from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    from sa3_convert.checkpoint.dimensions import CheckpointLayout


class Component(StrEnum):
    """The models that make up a bundle, in the order in which text-to-audio uses them."""

    TEXT_ENCODER = "text_encoder"
    NUMBER_CONDITIONER = "number_conditioner"
    DIT = "dit"
    DECODER = "decoder"
    ENCODER = "encoder"


TEXT_TO_AUDIO: Final = (Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER, Component.DIT, Component.DECODER)
"""Without which nothing is generated."""

TOKEN_TABLE: Final = "embed_tokens.weight"
"""The text encoder's table of tokens, which is stored as a recipe's `embedding` says."""


@dataclass(frozen=True, slots=True)
class Length:
    """A dynamic dimension: `factor` × T."""

    factor: int = 1

    def at(self, latents: int) -> int:
        """Return the dimension for a number of latents."""
        return self.factor * latents


Dimension = int | Length


@dataclass(frozen=True, slots=True)
class Port:
    """One named input or output."""

    name: str
    dtype: Literal["float32", "int32"]
    """MNN and the clients use int32; the exported ONNX takes the same type."""
    shape: tuple[Dimension, ...]

    def concrete(self, latents: int) -> tuple[int, ...]:
        """Return the shape at T = `latents`."""
        return tuple(d.at(latents) if isinstance(d, Length) else d for d in self.shape)

    @property
    def is_dynamic(self) -> bool:
        """Whether any dimension depends on T."""
        return any(isinstance(d, Length) for d in self.shape)


@dataclass(frozen=True, slots=True)
class Contract:
    """Inputs and outputs of one component of one checkpoint."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def is_dynamic(self) -> bool:
        """Whether the component has a length at all."""
        return any(port.is_dynamic for port in self.inputs)


T = Length()

SLOT_INPUTS: Final = ("adapter_inner", "adapter_outer")
"""For each layer, one after the other, 1 + rank runs of numbers: of the first a factor less one for each input channel,
then Aᵀ [channels, rank]; of the second a factor less one for each output channel, then Bᵀ [rank, channels]."""


def _text_encoder(layout: "CheckpointLayout") -> Contract:
    assert layout.text_encoder is not None
    n, width = layout.text_encoder.max_length, layout.text_encoder.hidden_size
    return Contract(
        inputs=(Port("input_ids", "int32", (1, n)), Port("attention_mask", "int32", (1, n))),
        outputs=(Port("last_hidden_state", "float32", (1, n, width)),),
    )


def _number_conditioner(layout: "CheckpointLayout") -> Contract:
    assert layout.number_conditioner is not None
    return Contract(
        inputs=(Port("seconds", "float32", (1,)),),
        outputs=(Port("embedding", "float32", (1, 1, layout.number_conditioner.output_dim)),),
    )


def _dit(layout: "CheckpointLayout") -> Contract:
    assert layout.dit is not None
    assert layout.text_encoder is not None
    dit = layout.dit
    # Cross-attention sees the prompt's tokens and one for `seconds_total`.
    tokens = layout.text_encoder.max_length + 1
    return Contract(
        inputs=(
            Port("x", "float32", (1, dit.io_channels, T)),
            Port("t", "float32", (1,)),
            Port("cross_attn_cond", "float32", (1, tokens, dit.cond_token_dim)),
            Port("global_embed", "float32", (1, dit.global_cond_dim)),
            Port("local_add_cond", "float32", (1, dit.local_add_cond_dim, T)),
            Port("padding_mask", "float32", (1, T)),
        ),
        outputs=(Port("out", "float32", (1, dit.io_channels, T)),),
    )


def _decoder(layout: "CheckpointLayout") -> Contract:
    auto = layout.autoencoder
    return Contract(
        inputs=(Port("latents", "float32", (1, auto.latent_dim, T)),),
        outputs=(Port("audio", "float32", (1, auto.audio_channels, Length(auto.downsampling_ratio))),),
    )


def _encoder(layout: "CheckpointLayout") -> Contract:
    auto = layout.autoencoder
    return Contract(
        inputs=(Port("patched_audio", "float32", (1, auto.encoder.io_channels, Length(auto.encoder.stride))),),
        outputs=(Port("encoder_latent", "float32", (1, auto.latent_dim, T)),),
    )


@dataclass(frozen=True, slots=True)
class ComponentSpec:
    """What the toolchain knows of a component apart from its weights."""

    contract: "Callable[[CheckpointLayout], Contract]"
    weights: tuple[str, ...]
    """Prefixes of its tensors in model.safetensors (the text encoder's own file is read whole)."""
    of_autoencoder: bool
    """Whether a checkpoint that holds an autoencoder alone has it."""
    even_latents: bool
    """SAME-S works on pairs of latents: a caller pads T to an even number and cuts the result."""
    stack: str | None = None
    """Path of the network's blocks that run one after the other, each on the state that the one before leaves."""
    early_parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of one that runs several times in a generation: parts that can be run ahead, and inputs that they may take."""


SPECS: Mapping[Component, ComponentSpec] = {
    Component.TEXT_ENCODER: ComponentSpec(_text_encoder, ("conditioner.conditioners.prompt.",), False, False, "layers"),
    Component.NUMBER_CONDITIONER: ComponentSpec(
        _number_conditioner, ("conditioner.conditioners.seconds_total.",), False, False
    ),
    Component.DIT: ComponentSpec(
        _dit,
        ("model.model.",),
        False,
        False,
        "transformer.layers",
        {
            "prepare": ("cross_attn_cond", "global_embed", "local_add_cond", "padding_mask", *SLOT_INPUTS),
            "time": ("t", *SLOT_INPUTS),
        },
    ),
    Component.DECODER: ComponentSpec(
        _decoder, ("pretransform.model.decoder.", "pretransform.model.bottleneck."), True, True
    ),
    Component.ENCODER: ComponentSpec(_encoder, ("pretransform.model.encoder.",), True, True),
}


def part_files(component: Component | None, model: str) -> dict[str, tuple[str, ...]]:
    """Return the files of the graphs that compute an ONNX model in parts, in the order in which they run.

    With each but the last come the inputs that it needs. A component that has no parts has no files.
    """
    early = SPECS[component].early_parts if component else {}
    stem = model.removesuffix(".onnx")
    return {f"{stem}.{part}.onnx": inputs for part, inputs in ({**early, "step": ()} if early else {}).items()}


def components_of(layout: "CheckpointLayout") -> tuple[Component, ...]:
    """Return the components that a checkpoint of this layout has, in pipeline order."""
    return tuple(c for c in Component if layout.dit is not None or SPECS[c].of_autoencoder)


def contract(component: Component, layout: "CheckpointLayout", rank: int | None = None) -> Contract:
    """Return the I/O contract of a component; UsageError if a checkpoint of this layout has none.

    With a rank it is that of the model with slots, which takes adapters of up to this rank as two more inputs; what
    adapters do not change has none.
    """
    if component not in components_of(layout):
        raise UsageError(f"This checkpoint holds an autoencoder alone; it has no component {component.value!r}.")
    plain = SPECS[component].contract(layout)
    if rank is None or component not in ADAPTED:
        return plain
    ports = [Port(name, "float32", (size,)) for name, size in slot_sizes(component, layout, rank).items()]
    return replace(plain, inputs=(*plain.inputs, *ports))


ADAPTED: Final = (Component.NUMBER_CONDITIONER, Component.DIT)
"""What adapters change."""
MOST_RANK: Final = 256
"""Of slots; a rank of 1024 would be as large as the weights themselves."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A layer that adapters can change, and where its part of the two inputs is, in multiples of 1 + rank."""

    layer: str
    """Its path within the network."""
    fan_out: int
    fan_in: int
    outer: int
    inner: int


def slots(component: Component, layout: "CheckpointLayout") -> tuple[Slot, ...]:
    """Return the layers of a component that adapters can change, sorted by name: all linears and convolutions."""
    from sa3_convert.checkpoint.tensors import expected_tensors

    (prefix,) = SPECS[component].weights
    found: list[Slot] = []
    outer = inner = 0
    for name, spec in expected_tensors(layout).items():
        if name.startswith(prefix) and name.endswith(".weight") and len(spec.shape) > 1:
            fan_out, fan_in = spec.shape[0], math.prod(spec.shape[1:])
            found.append(Slot(name[len(prefix) : -len(".weight")], fan_out, fan_in, outer, inner))
            outer, inner = outer + fan_out, inner + fan_in
    return tuple(found)


def slot_sizes(component: Component, layout: "CheckpointLayout", rank: int) -> dict[str, int]:
    """Return how many numbers each of a component's two inputs for adapters has."""
    last = slots(component, layout)[-1]
    ends = last.inner + last.fan_in, last.outer + last.fan_out
    return {name: (rank + 1) * end for name, end in zip(SLOT_INPUTS, ends, strict=True)}
