"""What a variant's configuration files say, at true or toy size."""

from typing import Any, Final

from sa3_convert.checkpoint.config import TEXT_ENCODER_FOLDER, layout_of, spelled_config, spelled_text_config
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.variants import (
    DIMENSIONS,
    LATENT_SAMPLES,
    SAMPLE_RATE,
    Dimensions,
    Size,
    Variant,
)

_PATCH: Final = 256
_CHANNELS: Final = 2
_HEAD: Final = 64
_ROPE_THETA: Final = 10000.0


def model_config(variant: Variant, size: Size) -> dict[str, Any]:
    """Return the contents of `model_config.json`."""
    dimensions = DIMENSIONS[variant.family, size]
    sliding = variant.family == "medium"
    model = autoencoder = _autoencoder(dimensions, sliding=sliding)
    if not variant.is_autoencoder:
        model = {
            "pretransform": {"type": "autoencoder", "iterate_batch": False, "chunked": True, "config": autoencoder},
            "conditioning": _conditioning(variant, dimensions),
            "diffusion": _diffusion(variant, dimensions),
            "io_channels": dimensions.autoencoder["latent_dim"],
        }
    config = spelled_config(
        {
            "model_type": "autoencoder" if variant.is_autoencoder else "diffusion_cond_inpaint",
            "sample_size": variant.sample_size,
            "sample_rate": SAMPLE_RATE,
            "audio_channels": _CHANNELS,
            "model": model,
        }
    )
    autoencoder = config["model"] if variant.is_autoencoder else config["model"]["pretransform"]["config"]
    for half in () if sliding else (autoencoder["encoder"]["config"], autoencoder["decoder"]["config"]):
        # The one key whose place differs between the published families.
        half["checkpointing"] = half.pop("checkpointing")
    return config


def published_layout(variant: Variant, size: Size) -> CheckpointLayout:
    """Return the dimensions of a variant."""
    return layout_of(model_config(variant, size), lambda: text_encoder_config(variant, size))


def _autoencoder(dimensions: Dimensions, *, sliding: bool) -> dict[str, Any]:
    latent_dim = dimensions.autoencoder["latent_dim"]
    half: dict[str, Any] = {
        **dimensions.autoencoder,
        "strides": [LATENT_SAMPLES // _PATCH],
        "dim_heads": _HEAD,
        "differential": True,
        "variable_stride": True,
        "use_flash": True,
        "mapping_style": "none",
    }
    if sliding:
        unused = ("conv_bias", "conformer", "layer_scale", "use_snake", "use_dilated_conv")
        half |= {"sliding_window": [1, 1]} | dict.fromkeys((*unused, "enable_inner_layer_dropout"), False)
        encoder: dict[str, Any] = {"mask_noise": 0.001, "checkpointing": True}
        decoder: dict[str, Any] = {"mask_noise": 0.1, "checkpointing": False}
    else:
        half |= {"dyt": True, "chunk_size": 32, "chunk_midpoint_shift": True, "checkpointing": False}
        encoder = {"mask_noise": 0.0, "conv_mapping": False}
        decoder = {"mask_noise": 0.01, "conv_mapping": True, "freeze_backbone": False}
    encoder |= {"in_channels": _PATCH * _CHANNELS, **half}
    decoder |= {"out_channels": _PATCH * _CHANNELS, "sinusoidal_blocks": [dimensions.sinusoidal_blocks], **half}
    bottleneck = {"dim": latent_dim, "noise_augment_dim": 0}
    return {
        "encoder": {"type": "taae_v2", "requires_grad": False, "config": encoder},
        "decoder": {"type": "taae_v2", "requires_grad": False, "config": decoder},
        "bottleneck": {
            "type": "softnorm",
            "config": bottleneck | dict.fromkeys(("noise_regularize", "auto_scale", "freeze"), True),
        },
        "pretransform": {"type": "patched", "config": {"patch_size": _PATCH, "channels": _CHANNELS}},
        "latent_dim": latent_dim,
        "downsampling_ratio": LATENT_SAMPLES,
        "io_channels": _CHANNELS,
    }


def _conditioning(variant: Variant, dimensions: Dimensions) -> dict[str, Any]:
    prompt = {
        "max_length": dimensions.max_length,
        "padding_mode": "learned",
        # Base forms name the post-trained repository as their text encoder's.
        "repo_id": variant.hub_id.removesuffix("-base"),
        "subfolder": TEXT_ENCODER_FOLDER,
    }
    seconds = {"min_val": 0, "max_val": 384, "fourier_features_type": "expo"}
    return {
        "cond_dim": dimensions.text_encoder["hidden_size"],
        "configs": [
            {"id": "prompt", "type": "t5gemma", "config": prompt},
            {"id": "seconds_total", "type": "number", "config": seconds},
        ],
    }


def _diffusion(variant: Variant, dimensions: Dimensions) -> dict[str, Any]:
    latent_dim = dimensions.autoencoder["latent_dim"]
    cond_dim = dimensions.text_encoder["hidden_size"]
    config: dict[str, Any] = {
        "io_channels": latent_dim,
        **dimensions.dit,
        "cond_token_dim": cond_dim,
        "global_cond_dim": cond_dim,
        "local_add_cond_dim": latent_dim + 1,
        "global_cond_type": "adaLN",
        "timestep_features_type": "expo",
        "timestep_features_logsnr": False,
        "attn_kwargs": {"qk_norm": "rms", "differential": variant.family == "medium"},
        "norm_type": "rms_norm",
        "norm_kwargs": {"force_fp32": True},
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
    text = DIMENSIONS[variant.family, size].text_encoder
    depth = text["num_hidden_layers"]
    tokens = {"vocab_size": text["vocab_size"], "pad_token_id": 0, "eos_token_id": 1}
    encoder = {
        **text,
        **tokens,
        "model_type": "t5_gemma_module",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "is_decoder": False,
        "layer_types": (["sliding_attention", "full_attention"] * depth)[:depth],
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        # Older tools read the former, newer ones the latter.
        "rope_theta": _ROPE_THETA,
        "rope_parameters": {"rope_theta": _ROPE_THETA, "rope_type": "default"},
        "bos_token_id": 2,
    }
    config = spelled_text_config(
        {
            **tokens,
            "architectures": ["T5GemmaForConditionalGeneration"],
            "model_type": "t5gemma",
            "dtype": "bfloat16",
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,
            "encoder": encoder,
        }
    )
    return {
        **config,
        "decoder": {**config["encoder"], "is_decoder": True, "cross_attention_hidden_size": text["hidden_size"]},
    }
