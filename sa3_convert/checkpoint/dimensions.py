"""Every dimension of a checkpoint, as frozen data: what `layout` reads and everything else is built by.

A checkpoint's configuration and a bundle's manifest both end here, so both are held to the same bounds. They leave room
for models several times the published ones, and none for numbers that would make a reader take all memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

Objective = Literal["rf_denoiser", "rectified_flow"]


@dataclass(frozen=True, slots=True)
class Within:
    """Bounds of a number, both included."""

    low: float
    high: float


_DEEPEST = 1000
"""The deepest published network has 24 layers."""

Width = Annotated[int, Within(1, 1 << 15)]
Inner = Annotated[int, Within(1, 1 << 20)]
Depth = Annotated[int, Within(1, _DEEPEST)]
Patch = Annotated[int, Within(1, 1 << 16)]
Positive = Annotated[float, Within(1e-12, 1e12)]
_LONGEST_RUN = 1 << 24
"""Samples that a decoder in chunks works on at once, at least."""
_MOST_LATENTS = 1 << 16
"""Of the longest piece; published are 4096."""
_LONGEST_NAME = 200


class _Checked:
    """Numbers are of their type and within their bounds, and the parts of a whole fit one another."""

    __slots__ = ()

    def __post_init__(self) -> None:
        checked: Any = type(self)
        name = checked.__name__
        for key, (kind, bounds) in _bounded(checked).items():
            value = getattr(self, key)
            of_kind = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
            if not of_kind or not bounds.low <= value <= bounds.high:
                what = "a whole number" if kind is int else "a number"
                raise ValueError(
                    f"{name}.{key} is {str(value)[:40]}, expected {what} from {bounds.low:g} to {bounds.high:g}"
                )
        for problem in self._problems():
            raise ValueError(f"{name} contradicts itself: {problem}")

    def _problems(self) -> Iterator[str]:
        """Yield what its numbers say that cannot be."""
        return iter(())


@cache
def _bounded(checked: type[Any]) -> dict[str, tuple[type, Within]]:
    """Return type and bounds of each number of a class."""
    hints: dict[str, Any] = get_type_hints(checked, include_extras=True)
    return {
        key: (get_args(hint)[0], bounds)
        for key, hint in hints.items()
        if get_origin(hint) is Annotated
        for bounds in get_args(hint)[1:]
        if isinstance(bounds, Within)
    }


def _unequal(first: str, left: object, second: str, right: object) -> Iterator[str]:
    if left != right:
        yield f"{first} is {left}, {second} is {right}"


def _no_multiple(first: str, left: int, second: str, right: int) -> Iterator[str]:
    if left % right:
        yield f"{first} {left} is no multiple of {second} {right}"


@dataclass(frozen=True, slots=True)
class TextEncoderLayout(_Checked):
    """T5Gemma encoder (Gemma-2 blocks) and the learned padding behind it."""

    vocab_size: Annotated[int, Within(2, 1 << 24)]
    hidden_size: Width
    intermediate_size: Inner
    num_layers: Depth
    num_heads: Width
    num_kv_heads: Width
    head_dim: Width
    query_pre_attn_scalar: Positive
    attn_logit_softcap: Positive
    rms_norm_eps: Annotated[float, Within(1e-12, 1.0)]
    rope_theta: Positive
    max_length: Annotated[int, Within(1, 1 << 13)]

    def _problems(self) -> Iterator[str]:
        yield from _no_multiple("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)


@dataclass(frozen=True, slots=True)
class NumberConditionerLayout(_Checked):
    """`seconds_total`: clamp, normalise, Fourier features, one linear."""

    min_value: Annotated[float, Within(-1e9, 1e9)]
    max_value: Annotated[float, Within(-1e9, 1e9)]
    features: Width
    output_dim: Width

    def _problems(self) -> Iterator[str]:
        if not self.min_value < self.max_value:
            yield f"min_value {self.min_value:g} is not below max_value {self.max_value:g}"


@dataclass(frozen=True, slots=True)
class DitLayout(_Checked):
    """Diffusion transformer."""

    io_channels: Width
    embed_dim: Width
    depth: Depth
    num_heads: Width
    cond_token_dim: Width
    global_cond_dim: Width
    local_add_cond_dim: Width
    num_memory_tokens: Annotated[int, Within(0, 1 << 15)]
    differential: bool
    ff_mult: Annotated[float, Within(1e-3, 1e3)]
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


@dataclass(frozen=True, slots=True)
class SameLayout(_Checked):
    """One half (encoder or decoder) of a SAME autoencoder."""

    io_channels: Inner
    width: Width
    latent_dim: Width
    stride: Patch
    depth: Depth
    head_dim: Width
    chunk_size: int | None
    """Samples (patches) per attention window, SAME-S; None with a sliding window, SAME-L."""
    sliding_window: tuple[int, int] | None
    """Groups (latents) to the left and right that a token sees, SAME-L."""
    mapping_kernel: Annotated[int, Within(1, 3)]
    ff_mult: Annotated[float, Within(1e-3, 1e3)]
    sinusoidal_from: Annotated[int, Within(0, _DEEPEST)]
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
            if type(self.chunk_size) is not int or not 0 < self.chunk_size <= _LONGEST_RUN:
                yield f"chunk_size is {str(self.chunk_size)[:40]}"
            else:
                yield from _no_multiple("chunk_size", self.chunk_size, "twice the stride", 2 * self.stride)
        for side in self.sliding_window or ():
            if type(side) is not int or not 0 < side < _DEEPEST:
                yield f"sliding_window holds {str(side)[:40]}, expected two whole numbers from 1 to {_DEEPEST - 1}"
        if self.sinusoidal_from > self.depth:
            yield f"sinusoidal_from is {self.sinusoidal_from}, depth {self.depth}"


@dataclass(frozen=True, slots=True)
class AutoencoderLayout(_Checked):
    """SAME autoencoder with its patched audio front and softnorm bottleneck."""

    encoder: SameLayout
    decoder: SameLayout
    latent_dim: Width
    patch_size: Patch
    audio_channels: Annotated[int, Within(2, 2)]
    downsampling_ratio: Annotated[int, Within(1, 1 << 20)]

    def _problems(self) -> Iterator[str]:
        for name, half in (("encoder", self.encoder), ("decoder", self.decoder)):
            yield from _unequal(f"{name}.latent_dim", half.latent_dim, "latent_dim", self.latent_dim)
            samples = self.patch_size * self.audio_channels
            yield from _unequal(f"{name}.io_channels", half.io_channels, "patch_size · audio_channels", samples)
            ratio = half.stride * self.patch_size
            yield from _unequal(f"{name}.stride · patch_size", ratio, "downsampling_ratio", self.downsampling_ratio)
            if half.chunk_size is not None and half.chunk_size * self.patch_size > _LONGEST_RUN:
                yield f"{name}.chunk_size · patch_size is {half.chunk_size * self.patch_size} samples"


@dataclass(frozen=True, slots=True)
class CheckpointLayout(_Checked):
    """Everything that is known of a checkpoint before its weights are read."""

    sample_rate: Annotated[int, Within(1000, 768_000)]
    sample_size: Annotated[int, Within(1, 2**31 - 1)]
    autoencoder: AutoencoderLayout
    dit: DitLayout | None
    text_encoder: TextEncoderLayout | None
    number_conditioner: NumberConditionerLayout | None
    objective: Objective | None
    source_id: str | None
    """The hub id that the checkpoint names as its own (where its text encoder comes from), if it does."""

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
