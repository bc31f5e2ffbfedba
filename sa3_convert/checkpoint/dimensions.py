"""Every dimension of a checkpoint, as frozen data: what a configuration says and everything else is built by.

A checkpoint's configuration and a bundle's manifest both end here, so both are held to the same bounds. They leave room
for models several times the published ones, and none for numbers that would make a reader take all memory.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Final, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from sa3_convert.checkpoint.json_file import Whole

Objective = Literal["rf_denoiser", "rectified_flow"]

_DEEPEST: Final = 1000
"""The deepest published network has 24 layers."""
_LONGEST_RUN: Final = 1 << 24
"""Samples that a decoder in chunks works on at once, at least."""
_MOST_LATENTS: Final = 1 << 16
"""Of the longest piece; published are 4096."""
_LONGEST_NAME: Final = 200

Width = Annotated[int, Field(ge=1, le=1 << 15)]
Inner = Annotated[int, Field(ge=1, le=1 << 20)]
Depth = Annotated[int, Field(ge=1, le=_DEEPEST)]
Patch = Annotated[int, Field(ge=1, le=1 << 16)]
Side = Annotated[int, Field(ge=1, lt=_DEEPEST)]
"""Groups (latents) that a token of a sliding window sees to one side."""
ChunkSize = Annotated[int, Field(ge=1, le=_LONGEST_RUN)]
Vocabulary = Annotated[int, Field(ge=2, le=1 << 24)]
Tokens = Annotated[int, Field(ge=1, le=1 << 13)]
MemoryTokens = Annotated[int, Field(ge=0, le=1 << 15)]
SampleRate = Annotated[int, Field(ge=1000, le=768_000)]
SampleSize = Annotated[int, Field(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Field(ge=1e-12, le=1e12)]
Epsilon = Annotated[float, Field(ge=1e-12, le=1)]
Multiple = Annotated[float, Field(ge=1e-3, le=1e3)]
Seconds = Annotated[float, Field(ge=-1e9, le=1e9)]

# Whole numbers are of no other type; keys that a later version adds to a manifest are left out.
_FROZEN: Final = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Checked:
    """Parts of a whole that fit one another."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(f"it contradicts itself: {problem}")

    def _problems(self) -> Iterator[str]:
        """Yield what its numbers say that cannot be."""
        return iter(())


def _unequal(first: str, left: object, second: str, right: object) -> Iterator[str]:
    if left != right:
        yield f"{first} is {left}, {second} is {right}"


def _no_multiple(first: str, left: int, second: str, right: int) -> Iterator[str]:
    if left % right:
        yield f"{first} {left} is no multiple of {second} {right}"


@dataclass(frozen=True, slots=True, config=_FROZEN)
class TextEncoderLayout(_Checked):
    """T5Gemma encoder (Gemma-2 blocks) and the learned padding behind it."""

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Inner
    num_layers: Depth
    num_heads: Width
    num_kv_heads: Width
    head_dim: Width
    query_pre_attn_scalar: Positive
    attn_logit_softcap: Positive
    rms_norm_eps: Epsilon
    rope_theta: Positive
    max_length: Tokens

    def _problems(self) -> Iterator[str]:
        yield from _no_multiple("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)


@dataclass(frozen=True, slots=True, config=_FROZEN)
class NumberConditionerLayout(_Checked):
    """`seconds_total`: clamp, normalise, Fourier features, one linear."""

    min_value: Seconds
    max_value: Seconds
    features: Width
    output_dim: Width

    def _problems(self) -> Iterator[str]:
        if not self.min_value < self.max_value:
            yield f"min_value {self.min_value:g} is not below max_value {self.max_value:g}"


@dataclass(frozen=True, slots=True, config=_FROZEN)
class DitLayout(_Checked):
    """Diffusion transformer."""

    io_channels: Width
    embed_dim: Width
    depth: Depth
    num_heads: Width
    cond_token_dim: Width
    global_cond_dim: Width
    local_add_cond_dim: Width
    num_memory_tokens: MemoryTokens
    differential: bool
    ff_mult: Multiple
    timestep_features: Width

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def ff_dim(self) -> int:
        """Inner width of the SwiGLU feed-forward."""
        return int(self.embed_dim * self.ff_mult)

    def _problems(self) -> Iterator[str]:
        yield from _no_multiple("embed_dim", self.embed_dim, "num_heads", self.num_heads)


@dataclass(frozen=True, slots=True, config=_FROZEN)
class SameLayout(_Checked):
    """One half (encoder or decoder) of a SAME autoencoder."""

    io_channels: Inner
    width: Width
    latent_dim: Width
    stride: Patch
    depth: Depth
    head_dim: Width
    chunk_size: ChunkSize | None
    """Samples (patches) per attention window, SAME-S; None with a sliding window, SAME-L."""
    sliding_window: tuple[Side, Side] | None
    """Groups (latents) to the left and right that a token sees, SAME-L."""
    mapping_kernel: Annotated[int, Field(ge=1, le=3)]
    ff_mult: Multiple
    sinusoidal_from: Annotated[int, Field(ge=0, le=_DEEPEST)]
    """Index of the first layer whose gate is sin(π·x); equal to `depth` when there is none."""

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        return self.width // self.head_dim

    @property
    def group(self) -> int:
        """Tokens per latent: `stride` patches and one more."""
        return self.stride + 1

    def _problems(self) -> Iterator[str]:
        yield from _no_multiple("width", self.width, "head_dim", self.head_dim)
        if (self.chunk_size is None) == (self.sliding_window is None):
            yield "attention is either in chunks (chunk_size) or in a sliding window"
        if self.chunk_size is not None:
            yield from _no_multiple("chunk_size", self.chunk_size, "twice the stride", 2 * self.stride)
        if self.sinusoidal_from > self.depth:
            yield f"sinusoidal_from is {self.sinusoidal_from}, depth {self.depth}"


@dataclass(frozen=True, slots=True, config=_FROZEN)
class AutoencoderLayout(_Checked):
    """SAME autoencoder with its patched audio front and softnorm bottleneck."""

    encoder: SameLayout
    decoder: SameLayout
    latent_dim: Width
    patch_size: Patch
    audio_channels: Annotated[int, Field(ge=2, le=2)]
    downsampling_ratio: Inner

    def _problems(self) -> Iterator[str]:
        for name, half in (("encoder", self.encoder), ("decoder", self.decoder)):
            yield from _unequal(f"{name}.latent_dim", half.latent_dim, "latent_dim", self.latent_dim)
            samples = self.patch_size * self.audio_channels
            yield from _unequal(f"{name}.io_channels", half.io_channels, "patch_size · audio_channels", samples)
            ratio = half.stride * self.patch_size
            yield from _unequal(f"{name}.stride · patch_size", ratio, "downsampling_ratio", self.downsampling_ratio)
            if half.chunk_size is not None and half.chunk_size * self.patch_size > _LONGEST_RUN:
                yield f"{name}.chunk_size · patch_size is {half.chunk_size * self.patch_size} samples"


_LARGEST_LOGSNR: Final = 16.0
"""Beyond it a float32 noise level is 0 or 1."""

Length = Annotated[int, Field(ge=1, le=1 << 20)]
"""In latents."""
LogSnr = Annotated[float, Field(ge=-_LARGEST_LOGSNR, le=_LARGEST_LOGSNR)]
Alpha = Annotated[float, Field(ge=0.01, le=100)]
Mu = Annotated[float, Field(ge=-10, le=10)]


class NoShift(Whole):
    """Noise levels fall in equal steps."""

    type: Literal["none"] = "none"


class LogSnrShift(Whole):
    """Log-SNR in equal steps, up to `logsnr_end`; it starts lower by `rate` for each doubling of the length."""

    type: Literal["logsnr"] = "logsnr"
    anchor_length: Length = 2000
    anchor_logsnr: LogSnr = -6.2
    """Where it starts at `anchor_length`."""
    rate: Annotated[float, Field(ge=-4, le=4)] = 1.0
    logsnr_end: LogSnr = 2.0

    def start(self, length: int) -> float:
        """Return the log-SNR that the schedule of a length starts at."""
        return self.anchor_logsnr - self.rate * math.log2(length / self.anchor_length)

    def fits(self, length: int) -> bool:
        """Tell whether the schedule of a length falls from noise to audio."""
        return -_LARGEST_LOGSNR <= self.start(length) < self.logsnr_end


class FluxShift(Whole):
    """The odds of noise, t / (1 − t), multiplied by alpha, which goes as a power of the length."""

    type: Literal["flux"] = "flux"
    min_length: Length = 256
    max_length: Length = 4096
    alpha_min: Alpha = 1.0
    alpha_max: Alpha = 1.0

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is above max_length {self.max_length}")
        if self.min_length == self.max_length and self.alpha_min != self.alpha_max:
            raise ValueError("one length (min_length equals max_length) has one alpha")
        return self


class FullShift(Whole):
    """The odds of noise multiplied by e to a power that goes linearly with the length; then a sine, if asked for."""

    type: Literal["full"] = "full"
    base_shift: Mu = 0.5
    max_shift: Mu = 1.15
    max_length: Length = 4096
    min_length: Length = 256
    use_sine: bool = False

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.min_length >= self.max_length:
            raise ValueError(f"min_length {self.min_length} is not below max_length {self.max_length}")
        return self


Shift = Annotated[NoShift | LogSnrShift | FluxShift | FullShift, Field(discriminator="type")]
"""How a schedule is bent towards noise: spelled as in `model_config.json`, with the reference's defaults."""
DEFAULT_SHIFT: Final = LogSnrShift(rate=0.0)
"""Of a checkpoint that brings none: the same for every length."""


@dataclass(frozen=True, slots=True, config=_FROZEN)
class CheckpointLayout(_Checked):
    """Everything that is known of a checkpoint before its weights are read."""

    sample_rate: SampleRate
    sample_size: SampleSize
    autoencoder: AutoencoderLayout
    dit: DitLayout | None = None
    text_encoder: TextEncoderLayout | None = None
    number_conditioner: NumberConditionerLayout | None = None
    objective: Objective | None = None
    source_id: str | None = None
    """The hub id that the checkpoint names as its own (where its text encoder comes from), if it does."""
    sampling_shift: Shift = DEFAULT_SHIFT
    """Of the schedule, unless a request brings another."""

    def _problems(self) -> Iterator[str]:
        auto, dit = self.autoencoder, self.dit
        latents = self.sample_size // auto.downsampling_ratio
        if not 1 <= latents <= _MOST_LATENTS:
            yield f"sample_size {self.sample_size} makes {latents} latents, expected 1 to {_MOST_LATENTS}"
        if self.source_id is not None and not (self.source_id.isprintable() and len(self.source_id) <= _LONGEST_NAME):
            yield f"source_id is no name of at most {_LONGEST_NAME} letters that can be shown"
        if dit is None or self.text_encoder is None or self.number_conditioner is None or self.objective is None:
            if (dit, self.text_encoder, self.number_conditioner, self.objective) != (None, None, None, None):
                yield "dit, text_encoder, number_conditioner and objective are there together or not at all"
            return
        yield from _unequal("dit.io_channels", dit.io_channels, "the autoencoder's latent_dim", auto.latent_dim)
        yield from _unequal("dit.local_add_cond_dim", dit.local_add_cond_dim, "latent_dim + 1", auto.latent_dim + 1)
        width = self.text_encoder.hidden_size
        for name, found in (
            ("dit.cond_token_dim", dit.cond_token_dim),
            ("dit.global_cond_dim", dit.global_cond_dim),
            ("number_conditioner.output_dim", self.number_conditioner.output_dim),
        ):
            yield from _unequal(name, found, "text_encoder.hidden_size", width)
