"""The networks' own parts of a checkpoint's configuration, in their published spelling: SAME, DiT and T5Gemma.

See `config` for what is refused.
"""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from sa3_convert.checkpoint.dimensions import (
    AutoencoderLayout,
    ChunkSize,
    Depth,
    DitLayout,
    Epsilon,
    Inner,
    MemoryTokens,
    Multiple,
    Patch,
    Positive,
    SameLayout,
    Side,
    TextEncoderLayout,
    Vocabulary,
    Width,
)
from sa3_convert.checkpoint.json_file import Kept, No, One, Picked, Unity, Unread, Whole, Yes, absent_is, only


class _SameConfig(Whole):
    mask_noise: Unread = None
    checkpointing: Unread = None
    conv_mapping: bool = False
    freeze_backbone: Unread = None
    io_channels: Inner
    sinusoidal_blocks: Annotated[list[Annotated[int, Field(ge=0)]], One, absent_is([0])]
    channels: Width = 128
    c_mults: Annotated[list[Width], One]
    strides: Annotated[list[Patch], One]
    latent_dim: Width = 32
    transformer_depths: Annotated[list[Depth], One]
    dim_heads: Width = 128
    differential: Yes = True
    variable_stride: Unread = None
    use_flash: Unread = None
    mapping_style: Literal["none"] = "none"
    sliding_window: Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    conv_bias: Unread = None
    conformer: No = False
    layer_scale: No = False
    use_snake: No = False
    use_dilated_conv: No = False
    enable_inner_layer_dropout: Unread = None
    dyt: Yes = True
    chunk_size: ChunkSize = 128
    chunk_midpoint_shift: bool = False
    causal: No = False
    feat_scale: No = False
    cross_attn: No = False
    mapping_bias: Yes = True
    ff_mult: Annotated[Multiple, Kept] = 3

    @model_validator(mode="after")
    def _is_implemented(self) -> Self:
        if self.sliding_window is None and not self.chunk_midpoint_shift:
            raise ValueError("chunk_midpoint_shift is False; only True is supported without a sliding_window")
        if self.sliding_window is None and self.transformer_depths[0] < 2:
            raise ValueError(f"transformer_depths {self.transformer_depths} leaves no layers to shift")
        if self.channels * self.c_mults[0] == self.io_channels:
            # The reference leaves the mapping convolution out then.
            raise ValueError(f"width {self.io_channels} equal to the audio-side channels is not supported")
        return self

    def layout(self) -> SameLayout:
        """Return its dimensions."""
        depth, window = self.transformer_depths[0], self.sliding_window
        return SameLayout(
            io_channels=self.io_channels,
            width=self.channels * self.c_mults[0],
            latent_dim=self.latent_dim,
            stride=self.strides[0],
            depth=depth,
            head_dim=self.dim_heads,
            chunk_size=self.chunk_size if window is None else None,
            sliding_window=None if window is None else (window[0], window[1]),
            mapping_kernel=3 if self.conv_mapping else 1,
            ff_mult=float(self.ff_mult),
            # The reference makes layer i sinusoidal when depth - i < sinusoidal_blocks, so blocks - 1 layers are.
            sinusoidal_from=max(0, min(depth, depth - self.sinusoidal_blocks[0] + 1)),
        )


class _EncoderConfig(_SameConfig):
    io_channels: Annotated[Inner, Field(alias="in_channels")]
    sinusoidal_blocks: Annotated[list[Annotated[int, Field(ge=0, le=0)]], One, absent_is([0])]


class _DecoderConfig(_SameConfig):
    io_channels: Annotated[Inner, Field(alias="out_channels")]


class _Half(Whole):
    # The published files use the older name; the reference builds a SAME whatever stands here.
    type: Literal["same", "taae_v2"]
    requires_grad: Unread = None
    config: _SameConfig
    soft_clip: No = False


class _Encoder(_Half):
    config: _EncoderConfig


class _Decoder(_Half):
    config: _DecoderConfig


class _SoftNorm(Whole):
    dim: Width = 32
    noise_augment_dim: Annotated[int, only(0)] = 0
    noise_regularize: Unread = None
    auto_scale: Annotated[Yes, absent_is(False)]
    freeze: Unread = None


class _Bottleneck(Whole):
    type: Literal["softnorm"]
    config: _SoftNorm
    requires_grad: Unread = None


class _Patches(Whole):
    patch_size: Patch
    channels: Annotated[int, only(2)]


class _Patched(Whole):
    type: Literal["patched"]
    config: _Patches
    enable_grad: Unread = None


class Autoencoder(Whole):
    """A SAME autoencoder."""

    encoder: _Encoder
    decoder: _Decoder
    bottleneck: _Bottleneck
    pretransform: _Patched
    latent_dim: Width
    downsampling_ratio: Inner
    io_channels: Annotated[int, only(2)] = 2
    in_channels: Annotated[int, only(2)] = 2
    out_channels: Annotated[int, only(2)] = 2
    soft_clip: No = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (dim := self.bottleneck.config.dim) != self.latent_dim:
            raise ValueError(f"it contradicts itself: the bottleneck's dim is {dim}, latent_dim is {self.latent_dim}")
        return self

    def layout(self) -> AutoencoderLayout:
        """Return its dimensions."""
        return AutoencoderLayout(
            encoder=self.encoder.config.layout(),
            decoder=self.decoder.config.layout(),
            latent_dim=self.latent_dim,
            patch_size=self.pretransform.config.patch_size,
            audio_channels=self.pretransform.config.channels,
            downsampling_ratio=self.downsampling_ratio,
        )


class AutoencoderAlone(Autoencoder):
    """A SAME autoencoder that is the whole model, of which the reference picks."""

    model_config = ConfigDict(extra="ignore")


class _AttentionKwargs(Whole):
    qk_norm: Annotated[Literal["rms"], absent_is("none")]
    differential: bool = False
    feat_scale: No = False


class _NormKwargs(Whole):
    force_fp32: Unread = None


class _FeedForwardKwargs(Whole):
    mult: Annotated[Multiple, Kept] = 4


class DitConfig(Whole):
    """The diffusion transformer."""

    io_channels: Width = 32
    embed_dim: Width = 768
    depth: Depth = 12
    num_heads: Width = 8
    cond_token_dim: Width
    global_cond_dim: Width
    local_add_cond_dim: Width
    global_cond_type: Annotated[Literal["adaLN"], absent_is("prepend")]
    timestep_features_type: Annotated[Literal["expo"], absent_is("learned")]
    timestep_features_logsnr: No = False
    num_memory_tokens: MemoryTokens = 0
    attn_kwargs: _AttentionKwargs
    norm_type: Annotated[Literal["rms_norm"], absent_is("layer_norm")]
    norm_kwargs: _NormKwargs = _NormKwargs()
    ff_kwargs: _FeedForwardKwargs = _FeedForwardKwargs()
    timestep_features_dim: Width = 256
    timestep_cond_type: Literal["global"] = "global"
    transformer_type: Literal["continuous_transformer"] = "continuous_transformer"
    conformer: No = False
    layer_scale: No = False
    causal: No = False
    cross_attn_rotary_pos_emb: No = False
    use_sinusoidal_emb: No = False
    use_abs_pos_emb: No = False
    rotary_pos_emb: Yes = True
    project_cond_tokens: Yes = True
    project_global_cond: Yes = True
    patch_size: Annotated[int, only(1)] = 1
    input_concat_dim: Annotated[int, only(0)] = 0
    prepend_cond_dim: Annotated[int, only(0)] = 0
    zero_init_branch_outputs: Unread = None

    def layout(self) -> DitLayout:
        """Return its dimensions."""
        return DitLayout(
            io_channels=self.io_channels,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            cond_token_dim=self.cond_token_dim,
            global_cond_dim=self.global_cond_dim,
            local_add_cond_dim=self.local_add_cond_dim,
            num_memory_tokens=self.num_memory_tokens,
            differential=self.attn_kwargs.differential,
            ff_mult=float(self.ff_kwargs.mult),
            timestep_features=self.timestep_features_dim,
        )


class _Rope(Whole):
    rope_theta: Annotated[Positive, Kept, Field(default=None)]
    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"
    partial_rotary_factor: Unity = 1


class _Gemma(Picked):
    model_type: Unread = None
    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Inner
    num_hidden_layers: Depth
    num_attention_heads: Width
    num_key_value_heads: Width
    head_dim: Width
    query_pre_attn_scalar: Annotated[Positive, Kept]
    attn_logit_softcapping: Annotated[Positive, Kept]
    final_logit_softcapping: Unread = None
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_bias: No = False
    attention_dropout: Unread = None
    is_decoder: Unread = None
    layer_types: Annotated[list[Literal["sliding_attention", "full_attention"]], Field(max_length=1000)] | None = None
    # At the lengths used here a sliding window this wide sees everything, so both layer types are full attention.
    sliding_window: Annotated[int, Field(ge=1)] = 4096
    max_position_embeddings: Unread = None
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Annotated[Positive, Kept, Field(default=None)]
    rope_parameters: _Rope | None = None
    pad_token_id: Unread = None
    eos_token_id: Unread = None
    bos_token_id: Unread = None
    rope_scaling: _Rope | None = None
    partial_rotary_factor: Unity | None = None

    @property
    def theta(self) -> float:
        """Theta, from either place or both; `rope_scaling` is what older files call `rope_parameters`."""
        places = (self, self.rope_parameters, self.rope_scaling)
        stated = [float(place.rope_theta) for place in places if place is not None and place.rope_theta is not None]
        if not stated:
            raise ValueError("the text encoder's rope_theta is stated neither as rope_theta nor in rope_parameters")
        if len(set(stated)) != 1:
            raise ValueError(f"the text encoder's rope_theta contradicts itself: {stated}")
        return stated[0]


class TextEncoderFile(Picked):
    """The T5Gemma `config.json`; its decoder is not used."""

    architectures: Unread = None
    model_type: Unread = None
    dtype: Unread = None
    is_encoder_decoder: Unread = None
    tie_word_embeddings: Unread = None
    vocab_size: Unread = None
    pad_token_id: Unread = None
    eos_token_id: Unread = None
    encoder: _Gemma
    quantization_config: None = None

    def layout(self, max_length: int) -> TextEncoderLayout:
        """Return the dimensions of the encoder, for prompts of this many tokens."""
        encoder = self.encoder
        return TextEncoderLayout(
            vocab_size=encoder.vocab_size,
            hidden_size=encoder.hidden_size,
            intermediate_size=encoder.intermediate_size,
            num_layers=encoder.num_hidden_layers,
            num_heads=encoder.num_attention_heads,
            num_kv_heads=encoder.num_key_value_heads,
            head_dim=encoder.head_dim,
            query_pre_attn_scalar=float(encoder.query_pre_attn_scalar),
            attn_logit_softcap=float(encoder.attn_logit_softcapping),
            rms_norm_eps=encoder.rms_norm_eps,
            rope_theta=encoder.theta,
            max_length=max_length,
        )
