"""Every dimension of a checkpoint, as frozen data: what `layout` reads and everything else is built by."""

from dataclasses import dataclass
from typing import Literal

Objective = Literal["rf_denoiser", "rectified_flow"]


@dataclass(frozen=True, slots=True)
class TextEncoderLayout:
    """T5Gemma encoder (Gemma-2 blocks) and the learned padding behind it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    attn_logit_softcap: float
    rms_norm_eps: float
    rope_theta: float
    max_length: int


@dataclass(frozen=True, slots=True)
class NumberConditionerLayout:
    """`seconds_total`: clamp, normalise, Fourier features, one linear."""

    min_value: float
    max_value: float
    features: int
    output_dim: int


@dataclass(frozen=True, slots=True)
class DitLayout:
    """Diffusion transformer."""

    io_channels: int
    embed_dim: int
    depth: int
    num_heads: int
    cond_token_dim: int
    global_cond_dim: int
    local_add_cond_dim: int
    num_memory_tokens: int
    differential: bool
    ff_mult: float
    timestep_features: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def ff_dim(self) -> int:
        """Inner width of the SwiGLU feed-forward."""
        return int(self.embed_dim * self.ff_mult)


@dataclass(frozen=True, slots=True)
class SameLayout:
    """One half (encoder or decoder) of a SAME autoencoder."""

    io_channels: int
    width: int
    latent_dim: int
    stride: int
    depth: int
    head_dim: int
    chunk_size: int | None
    """Samples (patches) per attention window, SAME-S; None with a sliding window, SAME-L."""
    sliding_window: tuple[int, int] | None
    """Groups (latents) to the left and right that a token sees, SAME-L."""
    mapping_kernel: int
    ff_mult: float
    sinusoidal_from: int
    """Index of the first layer whose gate is sin(π·x); equal to `depth` when there is none."""

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        return self.width // self.head_dim

    @property
    def group(self) -> int:
        """Tokens per latent: `stride` patches and one more."""
        return self.stride + 1


@dataclass(frozen=True, slots=True)
class AutoencoderLayout:
    """SAME autoencoder with its patched audio front and softnorm bottleneck."""

    encoder: SameLayout
    decoder: SameLayout
    latent_dim: int
    patch_size: int
    audio_channels: int
    downsampling_ratio: int


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """Everything that is known of a checkpoint before its weights are read."""

    sample_rate: int
    sample_size: int
    autoencoder: AutoencoderLayout
    dit: DitLayout | None
    text_encoder: TextEncoderLayout | None
    number_conditioner: NumberConditionerLayout | None
    objective: Objective | None
    source_id: str | None
    """The hub id that the checkpoint names as its own (where its text encoder comes from), if it does."""
