"""`model_config.json` and the T5Gemma `config.json` → every dimension, as frozen data.

A key that is absent means the reference constructor's default, never null. A setting that the networks here do not
implement is refused by its name: silently ignoring one would convert a different model. Objects that the reference
hands whole to a constructor may hold nothing unknown; from the others (the root, `model`, `model.diffusion`) it picks
what it needs, and what it never reads there (training, demos) is no concern here either.
"""

from pathlib import Path
from typing import Any

from sa3_convert.checkpoint.dimensions import (
    AutoencoderLayout,
    CheckpointLayout,
    DitLayout,
    NumberConditionerLayout,
    Objective,
    SameLayout,
    TextEncoderLayout,
)
from sa3_convert.checkpoint.section import Section, read_json, shown
from sa3_convert.errors import CheckpointError

__all__ = [
    "TEXT_ENCODER_FOLDER",
    "AutoencoderLayout",
    "CheckpointLayout",
    "DitLayout",
    "NumberConditionerLayout",
    "Objective",
    "SameLayout",
    "TextEncoderLayout",
    "read_json",
    "read_layout",
]

TEXT_ENCODER_FOLDER = "t5gemma-b-b-ul2"

# Bounds what a damaged file can make us do; the deepest published network has 24 layers.
_DEEPEST = 1000

# The published checkpoints say the latter; the reference builds the same model for both.
_DIFFUSION_TYPES = ("diffusion_cond", "diffusion_cond_inpaint")


def read_layout(folder: Path) -> CheckpointLayout:
    """Read the layout of the checkpoint in `folder`.

    Raises:
        CheckpointError: a file is missing or holds a setting that is not supported; the message names it.

    """
    try:
        return _layout(folder)
    except ValueError as error:
        raise CheckpointError(f"The configuration of {folder} cannot be used: {error}.") from None


def _layout(folder: Path) -> CheckpointLayout:
    config = Section(read_json(folder / "model_config.json"), "model_config.json")
    kind = config.raw("model_type")
    sample_rate = config.integer("sample_rate")
    sample_size = config.integer("sample_size")
    audio_channels = config.integer("audio_channels", 2)
    model = config.section("model")
    if kind == "autoencoder":
        return CheckpointLayout(
            sample_rate=sample_rate,
            sample_size=sample_size,
            autoencoder=_autoencoder(model, audio_channels, alone=True),
            dit=None,
            text_encoder=None,
            number_conditioner=None,
            objective=None,
            source_id=None,
        )
    if kind not in _DIFFUSION_TYPES:
        supported = ", ".join(repr(name) for name in (*_DIFFUSION_TYPES, "autoencoder"))
        raise CheckpointError(f"model_config.json.model_type is {shown(kind)}; supported: {supported}.")
    return _diffusion(folder, model, sample_rate, sample_size, audio_channels)


def _diffusion(
    folder: Path, model: Section, sample_rate: int, sample_size: int, audio_channels: int
) -> CheckpointLayout:
    pretransform = model.section("pretransform")
    pretransform.only("type", "autoencoder")
    pretransform.ignore("iterate_batch", "chunked", "enable_grad", "model_half")
    pretransform.only("scale", (1, 1.0), 1)
    autoencoder = _autoencoder(pretransform.section("config"), audio_channels)
    pretransform.finish()

    conditioning = model.section("conditioning")
    cond_dim = conditioning.integer("cond_dim")
    prompt, seconds = _conditioners(conditioning.raw("configs"))
    conditioning.only("default_keys", {}, {})
    conditioning.only("pre_encoded_keys", [], [])
    conditioning.finish()
    text_encoder, source_id = _text_encoder(folder, prompt, cond_dim)
    number_conditioner = _number_conditioner(seconds, cond_dim)

    diffusion = model.section("diffusion")
    objective = diffusion.raw("diffusion_objective", "v")
    if objective not in ("rf_denoiser", "rectified_flow"):
        raise CheckpointError(
            f"model.diffusion.diffusion_objective is {shown(objective)}; "
            "only 'rf_denoiser' and 'rectified_flow' are supported."
        )
    diffusion.only("type", "dit")
    diffusion.only("cross_attention_cond_ids", ["prompt", "seconds_total"])
    diffusion.only("global_cond_ids", ["seconds_total"])
    diffusion.only("local_add_cond_ids", ["inpaint_mask", "inpaint_masked_input"])
    for key in ("input_concat_ids", "prepend_cond_ids", "modular_local_cond_configs"):
        diffusion.only(key, [], [])
    diffusion.only("sampling_distribution_shift_options", None, None)
    diffusion.only("mask_padding_attention", True, False)
    dit = _dit(diffusion.section("config"))
    _same(
        "model.io_channels",
        model.integer("io_channels"),
        "the autoencoder's latent_dim",
        autoencoder.latent_dim,
    )
    return CheckpointLayout(
        sample_rate=sample_rate,
        sample_size=sample_size,
        autoencoder=autoencoder,
        dit=dit,
        text_encoder=text_encoder,
        number_conditioner=number_conditioner,
        objective=objective,
        source_id=source_id,
    )


def _same(left_name: str, left: int, right_name: str, right: int) -> None:
    if left != right:
        raise CheckpointError(f"model_config.json contradicts itself: {left_name} is {left}, {right_name} is {right}.")


def _conditioners(configs: Any) -> tuple[Section, Section]:
    types = {"prompt": "t5gemma", "seconds_total": "number"}
    found: dict[str, Section] = {}
    for index, entry in enumerate(configs if isinstance(configs, list) else []):
        section = Section(entry, f"model.conditioning.configs[{index}]")
        identifier = section.raw("id")
        if not isinstance(identifier, str) or identifier not in types:
            raise CheckpointError(f"Conditioner {shown(identifier)} is not supported; known: {', '.join(types)}.")
        if identifier in found:
            raise CheckpointError(f"model.conditioning.configs has two conditioners {identifier!r}.")
        section.only("type", types[identifier])
        found[identifier] = section.section("config")
        section.finish()
    for identifier in ("prompt", "seconds_total"):
        if identifier not in found:
            raise CheckpointError(f"model.conditioning.configs has no conditioner {identifier!r}.")
    return found["prompt"], found["seconds_total"]


def _number_conditioner(config: Section, cond_dim: int) -> NumberConditionerLayout:
    config.only("fourier_features_type", "expo", "learned")
    low, high = config.number("min_val", 0), config.number("max_val", 1)
    config.finish()
    return NumberConditionerLayout(min_value=low, max_value=high, features=256, output_dim=cond_dim)


def _text_encoder(folder: Path, prompt: Section, cond_dim: int) -> tuple[TextEncoderLayout, str | None]:
    prompt.only("padding_mode", "learned", "zero")
    prompt.only("project_out", False, False)
    prompt.only("model_name", "google/t5gemma-b-b-ul2", "google/t5gemma-b-b-ul2")
    prompt.only("subfolder", TEXT_ENCODER_FOLDER, TEXT_ENCODER_FOLDER)
    prompt.ignore("enable_grad", "model_path")
    max_length = prompt.integer("max_length", 128)
    source_id = prompt.raw("repo_id", None)
    prompt.finish()
    path = folder / TEXT_ENCODER_FOLDER / "config.json"
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path.parent} is missing: the text encoder belongs to the checkpoint. "
            f"Download the folder {TEXT_ENCODER_FOLDER} beside model.safetensors."
        )
    whole = Section(read_json(path), f"{TEXT_ENCODER_FOLDER}/config.json")
    whole.only("quantization_config", None, None)
    encoder = whole.section("encoder")
    layout = TextEncoderLayout(
        vocab_size=encoder.integer("vocab_size"),
        hidden_size=encoder.integer("hidden_size"),
        intermediate_size=encoder.integer("intermediate_size"),
        num_layers=encoder.integer("num_hidden_layers", maximum=_DEEPEST),
        num_heads=encoder.integer("num_attention_heads"),
        num_kv_heads=encoder.integer("num_key_value_heads"),
        head_dim=encoder.integer("head_dim"),
        query_pre_attn_scalar=encoder.number("query_pre_attn_scalar", positive=True),
        attn_logit_softcap=encoder.number("attn_logit_softcapping", positive=True),
        rms_norm_eps=encoder.number("rms_norm_eps", 1e-6, positive=True),
        rope_theta=_rope_theta(encoder),
        max_length=max_length,
    )
    encoder.only("hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    encoder.only("attention_bias", False, False)
    types = encoder.raw("layer_types", None) or []
    if not isinstance(types, list) or any(kind not in ("sliding_attention", "full_attention") for kind in types):
        raise CheckpointError(
            f"The text encoder's layer_types are {shown(types)}; only 'sliding_attention' and 'full_attention' are "
            "supported."
        )
    # At the lengths used here a sliding window this wide sees everything, so both layer types are full attention.
    window = encoder.integer("sliding_window", 4096)
    if window < max_length:
        raise CheckpointError(
            f"The text encoder's sliding_window {window} is shorter than the prompt's max_length {max_length}; "
            "only windows that see the whole prompt are supported."
        )
    return layout, source_id if isinstance(source_id, str) else None


def _rope_theta(encoder: Section) -> float:
    """Return theta, from either place or both; `rope_scaling` is what older files call `rope_parameters`."""
    encoder.only("partial_rotary_factor", (1, 1.0, None), None)
    stated = [encoder.number("rope_theta", positive=True)] if encoder.has("rope_theta") else []
    for key in ("rope_parameters", "rope_scaling"):
        if (parameters := encoder.optional_section(key)) is None:
            continue
        parameters.only("rope_type", "default", "default")
        parameters.only("type", "default", "default")
        parameters.only("partial_rotary_factor", (1, 1.0), 1)
        if parameters.has("rope_theta"):
            stated.append(parameters.number("rope_theta", positive=True))
        parameters.finish()
    if len(set(stated)) != 1:
        found = f"contradicts itself: {stated}" if stated else "is stated neither as rope_theta nor in rope_parameters"
        raise CheckpointError(f"The text encoder's rope_theta {found}.")
    return stated[0]


def _dit(config: Section) -> DitLayout:
    config.only("transformer_type", "continuous_transformer", "continuous_transformer")
    config.only("global_cond_type", "adaLN", "prepend")
    config.only("timestep_features_type", "expo", "learned")
    config.only("timestep_cond_type", "global", "global")
    config.only("norm_type", "rms_norm", "layer_norm")
    for key in (
        "timestep_features_logsnr",
        "conformer",
        "layer_scale",
        "causal",
        "cross_attn_rotary_pos_emb",
    ):
        config.only(key, False, False)
    for key in ("use_sinusoidal_emb", "use_abs_pos_emb"):
        config.only(key, False, False)
    config.only("rotary_pos_emb", True, True)
    config.ignore("zero_init_branch_outputs")
    config.only("project_cond_tokens", True, True)
    config.only("project_global_cond", True, True)
    config.only("patch_size", 1, 1)
    config.only("input_concat_dim", 0, 0)
    config.only("prepend_cond_dim", 0, 0)
    norm = Section(config.raw("norm_kwargs", {}), "dit.norm_kwargs")
    norm.ignore("force_fp32")
    norm.finish()
    attention = config.section("attn_kwargs")
    attention.only("qk_norm", "rms", "none")
    differential = attention.flag("differential", False)
    attention.only("feat_scale", False, False)
    attention.finish()
    feed_forward = Section(config.raw("ff_kwargs", {}), "dit.ff_kwargs")
    ff_mult = feed_forward.number("mult", 4, positive=True)
    feed_forward.finish()
    layout = DitLayout(
        io_channels=config.integer("io_channels", 32),
        embed_dim=config.integer("embed_dim", 768),
        depth=config.integer("depth", 12, maximum=_DEEPEST),
        num_heads=config.integer("num_heads", 8),
        cond_token_dim=config.integer("cond_token_dim"),
        global_cond_dim=config.integer("global_cond_dim"),
        local_add_cond_dim=config.integer("local_add_cond_dim"),
        num_memory_tokens=config.integer("num_memory_tokens", 0, minimum=0),
        differential=differential,
        ff_mult=ff_mult,
        timestep_features=config.integer("timestep_features_dim", 256),
    )
    config.finish()
    return layout


def _autoencoder(config: Section, audio_channels: int, *, alone: bool = False) -> AutoencoderLayout:
    patched = config.section("pretransform")
    patched.only("type", "patched")
    patched.ignore("enable_grad")
    patch = patched.section("config")
    patch_size = patch.integer("patch_size")
    channels = patch.integer("channels")
    patch.finish()
    patched.finish()
    bottleneck = config.section("bottleneck")
    bottleneck.only("type", "softnorm")
    bottleneck.ignore("requires_grad")
    norm = bottleneck.section("config")
    norm_dim = norm.integer("dim", 32)
    norm.only("noise_augment_dim", 0, 0)
    norm.only("auto_scale", True, False)
    norm.ignore("noise_regularize", "freeze")
    norm.finish()
    bottleneck.finish()
    latent_dim = config.integer("latent_dim")
    ratio = config.integer("downsampling_ratio")
    for key in ("io_channels", "in_channels", "out_channels"):
        config.only(key, channels, channels)
    config.only("soft_clip", False, False)
    encoder = _same_half(config.section("encoder"), "in_channels", "encoder")
    decoder = _same_half(config.section("decoder"), "out_channels", "decoder")
    if not alone:
        config.finish()
    _same("bottleneck dim", norm_dim, "latent_dim", latent_dim)
    _same("patched channels", channels, "audio_channels", audio_channels)
    return AutoencoderLayout(
        encoder=encoder,
        decoder=decoder,
        latent_dim=latent_dim,
        patch_size=patch_size,
        audio_channels=channels,
        downsampling_ratio=ratio,
    )


def _same_half(section: Section, channels_key: str, kind: str) -> SameLayout:
    # The published files use the older name; the reference builds a SAME whatever stands here.
    section.only("type", ("same", "taae_v2"))
    section.only("soft_clip", False, False)
    section.ignore("requires_grad")
    config = section.section("config")
    section.finish()
    config.ignore("checkpointing", "mask_noise", "freeze_backbone", "variable_stride", "conv_bias")
    config.ignore("use_flash", "enable_inner_layer_dropout")
    config.only("mapping_style", "none", "none")
    for key in ("conformer", "layer_scale", "causal", "feat_scale", "cross_attn", "use_snake", "use_dilated_conv"):
        config.only(key, False, False)
    config.only("differential", True, True)
    config.only("dyt", True, True)
    config.only("mapping_bias", True, True)
    depth = config.one_of_list("transformer_depths", maximum=_DEEPEST)
    stride = config.one_of_list("strides")
    sinusoidal = config.one_of_list("sinusoidal_blocks", [0], minimum=0) if kind == "decoder" else 0
    chunk_size, sliding_window = _attention_span(config, kind, stride, depth)
    layout = SameLayout(
        io_channels=config.integer(channels_key),
        width=config.integer("channels", 128) * config.one_of_list("c_mults"),
        latent_dim=config.integer("latent_dim", 32),
        stride=stride,
        depth=depth,
        head_dim=config.integer("dim_heads", 128),
        chunk_size=chunk_size,
        sliding_window=sliding_window,
        mapping_kernel=3 if config.flag("conv_mapping", False) else 1,
        ff_mult=config.number("ff_mult", 3, positive=True),
        # The reference makes layer i sinusoidal when depth - i < sinusoidal_blocks, so blocks - 1 layers are.
        sinusoidal_from=max(0, min(depth, depth - sinusoidal + 1)),
    )
    config.finish()
    if layout.width == layout.io_channels:
        # The reference leaves the mapping convolution out then.
        raise CheckpointError(f"{kind}: width {layout.width} equal to the audio-side channels is not supported.")
    return layout


def _attention_span(config: Section, kind: str, stride: int, depth: int) -> tuple[int | None, tuple[int, int] | None]:
    """Return (chunk_size, None) for attention in shifted chunks, (None, groups to each side) for a sliding window."""
    window = config.raw("sliding_window", None)
    if window is not None:
        config.ignore("chunk_size", "chunk_midpoint_shift")
        pair = isinstance(window, list) and len(window) == 2
        if not pair or not all(type(side) is int and 0 < side < _DEEPEST for side in window):
            raise CheckpointError(f"{kind}: sliding_window is {shown(window)}, expected two positive integers.")
        return None, (window[0], window[1])
    chunk_size = config.integer("chunk_size", 128)
    config.only("chunk_midpoint_shift", True, False)
    if depth < 2:
        raise CheckpointError(f"{kind}: transformer_depths [{depth}] leaves no layers to shift.")
    return chunk_size, None
