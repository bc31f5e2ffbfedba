"""A variant's configuration files as the published checkpoints spell them, at true or toy size."""

from typing import Any

from sa3_convert.checkpoint.config import TEXT_ENCODER_FOLDER
from sa3_convert.checkpoint.variants import (
    DIMENSIONS,
    LATENT_SAMPLES,
    SAMPLE_RATE,
    AutoencoderSize,
    Dimensions,
    Size,
    TextEncoderSize,
    Variant,
)

_PATCH = 256
_CHANNELS = 2
_STRIDE = LATENT_SAMPLES // _PATCH
_HEAD = 64
_ROPE_THETA = 10000.0


def model_config(variant: Variant, size: Size) -> dict[str, Any]:
    """Return the contents of `model_config.json`."""
    dimensions = DIMENSIONS[variant.family, size]
    autoencoder = _autoencoder(dimensions.autoencoder, sliding=variant.family == "medium")
    config: dict[str, Any] = {
        "model_type": "autoencoder" if variant.is_autoencoder else "diffusion_cond_inpaint",
        "sample_size": variant.sample_size,
        "sample_rate": SAMPLE_RATE,
        "audio_channels": _CHANNELS,
    }
    if variant.is_autoencoder:
        return {**config, "model": autoencoder}
    model = {
        "pretransform": {"type": "autoencoder", "iterate_batch": False, "chunked": True, "config": autoencoder},
        "conditioning": _conditioning(variant, dimensions.text_encoder),
        "diffusion": _diffusion(variant, dimensions),
        "io_channels": dimensions.autoencoder.latent_dim,
    }
    return {**config, "model": model}


def _autoencoder(size: AutoencoderSize, *, sliding: bool) -> dict[str, Any]:
    half: dict[str, Any] = {
        "channels": size.channels,
        "c_mults": [size.multiplier],
        "strides": [_STRIDE],
        "latent_dim": size.latent_dim,
        "transformer_depths": [size.depth],
        "dim_heads": _HEAD,
        "differential": True,
        "variable_stride": True,
        "use_flash": True,
        "mapping_style": "none",
    }
    if sliding:
        unused = (
            "conv_bias",
            "conformer",
            "layer_scale",
            "use_snake",
            "use_dilated_conv",
            "enable_inner_layer_dropout",
        )
        half |= {"sliding_window": [1, 1]} | dict.fromkeys(unused, False)
        encoder: dict[str, Any] = {"mask_noise": 0.001, "checkpointing": True}
        decoder: dict[str, Any] = {"mask_noise": 0.1, "checkpointing": False}
    else:
        half |= {"dyt": True, "chunk_size": 32, "chunk_midpoint_shift": True, "checkpointing": False}
        encoder = {"mask_noise": 0.0, "conv_mapping": False}
        decoder = {"mask_noise": 0.01, "conv_mapping": True, "freeze_backbone": False}
    width = _PATCH * _CHANNELS
    encoder |= {"in_channels": width, **half}
    decoder |= {"out_channels": width, "sinusoidal_blocks": [size.sinusoidal_blocks], **half}
    bottleneck = {
        "dim": size.latent_dim,
        "noise_augment_dim": 0,
        "noise_regularize": True,
        "auto_scale": True,
        "freeze": True,
    }
    return {
        "encoder": {"type": "taae_v2", "requires_grad": False, "config": encoder},
        "decoder": {"type": "taae_v2", "requires_grad": False, "config": decoder},
        "bottleneck": {"type": "softnorm", "config": bottleneck},
        "pretransform": {"type": "patched", "config": {"patch_size": _PATCH, "channels": _CHANNELS}},
        "latent_dim": size.latent_dim,
        "downsampling_ratio": LATENT_SAMPLES,
        "io_channels": _CHANNELS,
    }


def _conditioning(variant: Variant, text_encoder: TextEncoderSize) -> dict[str, Any]:
    prompt = {
        "max_length": text_encoder.max_length,
        "padding_mode": "learned",
        # Base forms name the post-trained repository as their text encoder's.
        "repo_id": variant.hub_id.removesuffix("-base"),
        "subfolder": TEXT_ENCODER_FOLDER,
    }
    seconds = {"min_val": 0, "max_val": 384, "fourier_features_type": "expo"}
    return {
        "cond_dim": text_encoder.width,
        "configs": [
            {"id": "prompt", "type": "t5gemma", "config": prompt},
            {"id": "seconds_total", "type": "number", "config": seconds},
        ],
    }


def _diffusion(variant: Variant, dimensions: Dimensions) -> dict[str, Any]:
    dit, latent_dim = dimensions.dit, dimensions.autoencoder.latent_dim
    cond_dim = dimensions.text_encoder.width
    config: dict[str, Any] = {
        "io_channels": latent_dim,
        "embed_dim": dit.width,
        "depth": dit.depth,
        "num_heads": dit.heads,
        "cond_token_dim": cond_dim,
        "global_cond_dim": cond_dim,
        "local_add_cond_dim": latent_dim + 1,
        "global_cond_type": "adaLN",
        "timestep_features_type": "expo",
        "timestep_features_logsnr": False,
        "num_memory_tokens": dit.memory_tokens,
        "attn_kwargs": {"qk_norm": "rms", "differential": variant.family == "medium"},
        "norm_type": "rms_norm",
        "norm_kwargs": {"force_fp32": True},
        "ff_kwargs": {"mult": dit.ff_mult},
    }
    return {
        "type": "dit",
        "diffusion_objective": variant.objective,
        "cross_attention_cond_ids": ["prompt", "seconds_total"],
        "global_cond_ids": ["seconds_total"],
        "local_add_cond_ids": ["inpaint_mask", "inpaint_masked_input"],
        "mask_padding_attention": True,
        "use_effective_length_for_schedule": True,
        "distribution_shift_options": {"type": "full", "min_length": 256, "max_length": 4096},
        "config": config,
    }


def text_encoder_config(variant: Variant, size: Size) -> dict[str, Any]:
    """Return the contents of the T5Gemma folder's `config.json`."""
    text_encoder = DIMENSIONS[variant.family, size].text_encoder
    encoder = _gemma(text_encoder)
    decoder = {**encoder, "is_decoder": True, "cross_attention_hidden_size": text_encoder.width}
    return {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "model_type": "t5gemma",
        "dtype": "bfloat16",
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "vocab_size": text_encoder.vocab_size,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "encoder": encoder,
        "decoder": decoder,
    }


def _gemma(size: TextEncoderSize) -> dict[str, Any]:
    return {
        "model_type": "t5_gemma_module",
        "vocab_size": size.vocab_size,
        "hidden_size": size.width,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": size.head_dim,
        "query_pre_attn_scalar": size.query_pre_attn_scalar,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "is_decoder": False,
        "layer_types": ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(size.depth)],
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        # Older tools read the former, newer ones the latter.
        "rope_theta": _ROPE_THETA,
        "rope_parameters": {"rope_theta": _ROPE_THETA, "rope_type": "default"},
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
