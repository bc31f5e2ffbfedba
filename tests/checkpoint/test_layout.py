import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from sa3_convert.checkpoint.config import read_layout, spelled_config, spelled_text_config
from sa3_convert.checkpoint.dimensions import CheckpointLayout, FluxShift, FullShift, LogSnrShift, NoShift, Shift
from sa3_convert.checkpoint.published import model_config, text_encoder_config
from sa3_convert.checkpoint.variants import VARIANTS
from sa3_convert.errors import CheckpointError
from tests.checkpoint.conftest import edit_json
from tests.conftest import GOLDEN

Config = dict[str, Any]


def write_configs(folder: Path, config: Config, text_encoder: Config) -> Path:
    (folder / "t5gemma-b-b-ul2").mkdir(parents=True, exist_ok=True)
    (folder / "model_config.json").write_text(json.dumps(config))
    (folder / "t5gemma-b-b-ul2" / "config.json").write_text(json.dumps(text_encoder))
    return folder


def dit(config: Config) -> Config:
    return config["model"]["diffusion"]["config"]


def decoder(config: Config) -> Config:
    return config["model"]["pretransform"]["config"]["decoder"]["config"]


def test_published_small_has_the_published_dimensions(tmp_path: Path) -> None:
    variant = VARIANTS["small-music"]
    layout = read_layout(write_configs(tmp_path, model_config(variant, "full"), text_encoder_config(variant, "full")))
    assert layout.dit is not None
    assert layout.text_encoder is not None
    assert (layout.dit.embed_dim, layout.dit.depth, layout.dit.num_heads, layout.dit.head_dim) == (1024, 20, 16, 64)
    assert (layout.dit.ff_dim, layout.dit.local_add_cond_dim, layout.dit.num_memory_tokens) == (4096, 257, 64)
    assert not layout.dit.differential
    auto = layout.autoencoder
    assert (auto.latent_dim, auto.downsampling_ratio) == (256, 4096)
    assert (auto.decoder.width, auto.decoder.depth, auto.decoder.mapping_kernel, auto.encoder.mapping_kernel) == (
        768,
        6,
        3,
        1,
    )
    assert (auto.decoder.chunk_size, auto.decoder.sliding_window) == (32, None)
    assert auto.decoder.sinusoidal_from == auto.decoder.depth
    assert (layout.text_encoder.vocab_size, layout.text_encoder.max_length) == (256000, 256)
    assert layout.sample_size >= 120 * layout.sample_rate


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, LogSnrShift(rate=0)),
        ({"type": "logsnr"}, LogSnrShift(anchor_length=2000, anchor_logsnr=-6.2, rate=1, logsnr_end=2)),
        ({"type": "flux", "alpha_min": 6.93, "alpha_max": 6.93}, FluxShift(alpha_min=6.93, alpha_max=6.93)),
        ({"base_shift": 0.25}, FullShift(base_shift=0.25, max_shift=1.15, min_length=256, max_length=4096)),
        ({"type": "none"}, NoShift()),
    ],
)
def test_the_shift_of_the_schedule_is_read_and_survives_a_manifest(
    copy: Path, options: Config | None, expected: Shift
) -> None:
    edit_json(
        copy / "model_config.json",
        lambda c: c["model"]["diffusion"].update(sampling_distribution_shift_options=options),
    )
    layout = read_layout(copy)
    assert layout.sampling_shift == expected
    adapter = TypeAdapter(CheckpointLayout)
    assert adapter.validate_json(adapter.dump_json(layout)) == layout


def test_a_layout_of_before_has_the_shift_that_everything_had(copy: Path) -> None:
    adapter = TypeAdapter(CheckpointLayout)
    written = adapter.dump_python(read_layout(copy), mode="json")
    del written["sampling_shift"]
    assert adapter.validate_json(json.dumps(written)).sampling_shift == LogSnrShift(rate=0)


def test_published_medium_has_the_published_dimensions(tmp_path: Path) -> None:
    variant = VARIANTS["medium"]
    layout = read_layout(write_configs(tmp_path, model_config(variant, "full"), text_encoder_config(variant, "full")))
    assert layout.dit is not None
    assert (layout.dit.embed_dim, layout.dit.depth, layout.dit.differential) == (1536, 24, True)
    decoder = layout.autoencoder.decoder
    assert (decoder.width, decoder.depth, decoder.sliding_window, decoder.chunk_size) == (1536, 12, (1, 1), None)
    # Blocks 5 to 11 take the sine of their gate.
    assert (decoder.sinusoidal_from, decoder.mapping_kernel) == (5, 1)


@pytest.mark.parametrize("family", ["small", "medium"])
def test_golden_checkpoints_are_read(family: str) -> None:
    layout = read_layout(GOLDEN / family / "checkpoint")
    assert layout.objective == "rf_denoiser"
    assert layout.source_id == f"example/{family}"


@pytest.mark.parametrize("family", ["small", "medium"])
def test_what_is_read_is_written_back_as_it_was_spelled(family: str) -> None:
    folder = GOLDEN / family / "checkpoint"
    config = json.loads((folder / "model_config.json").read_text())
    text = json.loads((folder / "t5gemma-b-b-ul2" / "config.json").read_text())
    assert json.dumps(spelled_config(config), sort_keys=True) == json.dumps(config, sort_keys=True)
    written = spelled_text_config(text)["encoder"]
    assert json.dumps(written) == json.dumps({key: text["encoder"][key] for key in written})


@pytest.mark.parametrize("name", ["same-s", "same-l"])
def test_an_autoencoder_alone_has_no_other_parts(tmp_path: Path, name: str) -> None:
    (tmp_path / "model_config.json").write_text(json.dumps(model_config(VARIANTS[name], "full")))
    layout = read_layout(tmp_path)
    assert layout.autoencoder.latent_dim == 256
    assert (layout.dit, layout.text_encoder, layout.number_conditioner, layout.objective) == (None,) * 4


@pytest.mark.parametrize("kind", ["diffusion_cond", "diffusion_cond_inpaint"])
def test_both_names_of_the_diffusion_model_are_taken(copy: Path, kind: str) -> None:
    edit_json(copy / "model_config.json", lambda c: c.update(model_type=kind))
    assert read_layout(copy).dit is not None


def test_what_the_reference_never_reads_does_not_matter(copy: Path) -> None:
    def add(config: Config) -> None:
        config["training"] = {"learning_rate": 1}
        config["dataset"] = "x"
        config["model"]["discriminator"] = {}
        config["model"]["diffusion"]["comment"] = "x"

    expected = read_layout(copy)
    edit_json(copy / "model_config.json", add)
    assert read_layout(copy) == expected


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters"])
def test_theta_is_found_in_both_places(copy: Path, spelling: str) -> None:
    def put(config: Config) -> None:
        del config["encoder"]["rope_parameters"], config["encoder"]["rope_theta"]
        theta = {"rope_theta": 500.0}
        config["encoder"].update(theta if spelling == "rope_theta" else {"rope_parameters": theta})

    edit_json(copy / "t5gemma-b-b-ul2" / "config.json", put)
    text_encoder = read_layout(copy).text_encoder
    assert text_encoder is not None
    assert text_encoder.rope_theta == 500.0


def text_theta(copy: Path, **settings: object) -> float:
    edit_json(copy / "t5gemma-b-b-ul2" / "config.json", lambda c: c["encoder"].update(settings))
    text_encoder = read_layout(copy).text_encoder
    assert text_encoder is not None
    return text_encoder.rope_theta


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}, "rope_parameters": None},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 10000}},
        {"rope_parameters": {"rope_theta": 10000, "rope_type": "default", "partial_rotary_factor": 1.0}},
    ],
)
def test_ways_to_say_that_positions_are_not_scaled_are_taken(copy: Path, settings: dict[str, object]) -> None:
    assert text_theta(copy, **settings) == 10000.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor"),
        ({"rope_scaling": "linear"}, "rope_scaling is str, expected an object"),
        ({"rope_parameters": {"rope_theta": 10000, "factor": 8.0}}, "rope_parameters.factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 10000}}}, "rope_parameters.full_attention"),
        ({"rope_parameters": {"rope_theta": 500}}, r"rope_theta contradicts itself: \[10000.0, 500.0\]"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_parameters.rope_theta is None"),
        ({"layer_types": ["chunked_attention"] * 3}, r"layer_types\[0\] is 'chunked_attention'; only"),
        ({"layer_types": 3}, "layer_types is 3, expected a list"),
    ],
)
def test_other_ways_to_place_or_see_tokens_are_refused(copy: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        text_theta(copy, **settings)


def test_a_theta_that_is_stated_nowhere_is_refused(copy: Path) -> None:
    def remove(config: Config) -> None:
        del config["encoder"]["rope_parameters"], config["encoder"]["rope_theta"]

    edit_json(copy / "t5gemma-b-b-ul2" / "config.json", remove)
    with pytest.raises(CheckpointError, match="is stated neither as rope_theta nor in rope_parameters"):
        read_layout(copy)


def test_both_spellings_of_theta_are_written(copy: Path) -> None:
    encoder = json.loads((copy / "t5gemma-b-b-ul2" / "config.json").read_text())["encoder"]
    assert encoder["rope_theta"] == encoder["rope_parameters"]["rope_theta"] == 10000.0


UNSUPPORTED: dict[str, tuple[Callable[[Config], object], str]] = {
    "kind": (lambda c: c.update(model_type="lm"), r"model_config.json.model_type is 'lm'; only .*'autoencoder'"),
    "objective": (lambda c: c["model"]["diffusion"].update(diffusion_objective="v"), "diffusion_objective is 'v'"),
    "conditioner": (
        lambda c: c["model"]["conditioning"]["configs"].append({"id": "bpm", "type": "number", "config": {}}),
        "id is 'bpm'; only 'prompt', 'seconds_total'",
    ),
    "conditioner absent": (lambda c: c["model"]["conditioning"]["configs"].pop(), "no conditioner 'seconds_total'"),
    "padding": (
        lambda c: c["model"]["conditioning"]["configs"][0]["config"].pop("padding_mode"),
        "padding_mode is 'zero'",
    ),
    "fourier": (
        lambda c: c["model"]["conditioning"]["configs"][1]["config"].pop("fourier_features_type"),
        "fourier_features_type is 'learned'",
    ),
    "shift": (
        lambda c: c["model"]["diffusion"].update(sampling_distribution_shift_options={"type": "cosine"}),
        "sampling_distribution_shift_options.type is 'cosine'; only 'none', 'logsnr', 'flux', 'full' are supported",
    ),
    "shift's key": (
        lambda c: c["model"]["diffusion"].update(sampling_distribution_shift_options={"type": "flux", "alpha": 2}),
        "alpha is not supported",
    ),
    "shift's range": (
        lambda c: c["model"]["diffusion"].update(sampling_distribution_shift_options={"min_length": 5000}),
        "min_length 5000 is not below max_length 4096",
    ),
    "dit key": (lambda c: dit(c).update(new_trick=1), "dit.*new_trick|config.new_trick"),
    "dit setting": (lambda c: dit(c).update(timestep_features_type="learned"), "timestep_features_type is 'learned'"),
    "norm": (lambda c: dit(c)["attn_kwargs"].update(qk_norm="ln"), "qk_norm is 'ln'"),
    "heads": (lambda c: dit(c).update(num_heads=3), "no multiple of num_heads 3"),
    "contradiction": (lambda c: dit(c).update(io_channels=16), "contradicts itself"),
    "string for a number": (lambda c: dit(c).update(depth="2"), "depth is '2'"),
    "too deep": (lambda c: dit(c).update(depth=10**9), "depth is 1000000000"),
    "text for a flag": (lambda c: dit(c)["attn_kwargs"].update(differential="no"), "expected true or false"),
    "snake": (lambda c: decoder(c).update(use_snake=True), "use_snake is True"),
    "same key": (lambda c: decoder(c).update(new_trick=1), "new_trick"),
    "strides": (lambda c: decoder(c).update(strides=[4, 4]), r"strides is \[4, 4\], expected a length of at most 1"),
    "chunk": (lambda c: decoder(c).update(chunk_size=40), "chunk_size 40"),
    "window": (lambda c: decoder(c).update(sliding_window=[1]), "sliding_window is"),
    "bottleneck": (
        lambda c: c["model"]["pretransform"]["config"]["bottleneck"].update(type="vae"),
        "type is 'vae'",
    ),
    "scaled latents": (lambda c: c["model"]["pretransform"].update(scale=0.5), "pretransform.scale is 0.5"),
    "channels": (lambda c: c["model"]["pretransform"]["config"].update(io_channels=1), "io_channels is 1; only 2"),
    "number for a flag": (lambda c: decoder(c).update(differential=1), "differential is 1, expected true or false"),
    "in a list": (lambda c: decoder(c).update(strides=["4"]), r"strides\[0\] is '4', expected a whole number"),
    "window of nulls": (lambda c: decoder(c).update(sliding_window=[1, None]), r"sliding_window\[1\] is None"),
    "the other half's": (
        lambda c: decoder(c).update(in_channels=512),
        r"decoder\.config\.in_channels is not supported",
    ),
    "field's own name": (lambda c: decoder(c).update(io_channels=512), "decoder.config.io_channels is not supported"),
    "list for an object": (lambda c: c.update(model=[]), "expected an object"),
    "missing": (lambda c: c.pop("sample_rate"), "no 'sample_rate'"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_settings_are_refused_by_name(copy: Path, case: str) -> None:
    edit, message = UNSUPPORTED[case]
    edit_json(copy / "model_config.json", lambda c: edit(c) and None)
    with pytest.raises(CheckpointError, match=message):
        read_layout(copy)


UNSUPPORTED_TEXT: dict[str, tuple[Callable[[Config], object], str]] = {
    "window": (lambda c: c["encoder"].update(sliding_window=8), "sliding_window 8 is shorter"),
    "activation": (lambda c: c["encoder"].update(hidden_activation="silu"), "hidden_activation is 'silu'"),
    "width": (lambda c: c["encoder"].update(hidden_size=32), "contradicts itself"),
    "rope": (lambda c: c["encoder"]["rope_parameters"].update(rope_type="yarn"), "rope_type is 'yarn'"),
    "infinity": (lambda c: c["encoder"].update(query_pre_attn_scalar=float("inf")), "Infinity is no number"),
    "zero": (lambda c: c["encoder"].update(query_pre_attn_scalar=0), "query_pre_attn_scalar is 0, expected at least"),
    "quantised": (lambda c: c.update(quantization_config={"bits": 4}), "quantization_config is"),
    "no encoder": (lambda c: c.pop("encoder"), "no 'encoder'"),
}


@pytest.mark.parametrize("case", UNSUPPORTED_TEXT)
def test_unsupported_text_encoders_are_refused_by_name(copy: Path, case: str) -> None:
    edit, message = UNSUPPORTED_TEXT[case]
    edit_json(copy / "t5gemma-b-b-ul2" / "config.json", lambda c: edit(c) and None)
    with pytest.raises(CheckpointError, match=message):
        read_layout(copy)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = [leaf for key, value in items for leaf in leaves(value, (*path, key))]
    return [path, *found] if path else found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
TOY_CONFIG = model_config(VARIANTS["small-music"], "toy")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(leaves(TOY_CONFIG)), value=JSON)
def test_any_value_anywhere_is_read_or_refused(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    config = json.loads(json.dumps(TOY_CONFIG))
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    write_configs(tmp_path, config, text_encoder_config(VARIANTS["small-music"], "toy"))
    # Anything but a CheckpointError is a failure.
    with contextlib.suppress(CheckpointError):
        read_layout(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80) | JSON.map(lambda data: json.dumps(data).encode()))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model_config.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_layout(tmp_path)


def test_json_too_deep_to_parse_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_layout(tmp_path)


@pytest.mark.parametrize("name", ["model_config.json", "t5gemma-b-b-ul2/config.json"])
def test_a_configuration_of_megabytes_is_refused_before_it_is_parsed(copy: Path, name: str) -> None:
    edit_json(copy / name, lambda c: c.update({f"a{index}": 0 for index in range(100_000)}))
    with pytest.raises(CheckpointError, match="has more than 1048576 bytes"):
        read_layout(copy)


def test_of_thousands_of_faults_the_first_are_told(copy: Path) -> None:
    edit_json(copy / "model_config.json", lambda c: dit(c).update({"k" * 1000 + str(index): 0 for index in range(900)}))
    with pytest.raises(CheckpointError, match="; and 895 more") as caught:
        read_layout(copy)
    assert len(str(caught.value)) < 3000


TOO_MUCH: dict[str, tuple[Callable[[Config], object], str]] = {
    "no rate": (lambda c: c.update(sample_rate=1), "sample_rate is 1, expected at least 1000"),
    "no latent": (lambda c: c.update(sample_size=1), "sample_size 1 makes 0 latents"),
    "mono": (lambda c: c.update(audio_channels=1), "audio_channels is 1"),
    "wide": (lambda c: dit(c).update(embed_dim=2**31 - 1), "embed_dim is 2147483647"),
    "window of hours": (lambda c: decoder(c).update(chunk_size=2**26), "chunk_size"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_no_memory_holds_is_refused_by_name(copy: Path, case: str) -> None:
    edit, message = TOO_MUCH[case]
    edit_json(copy / "model_config.json", lambda c: edit(c) and None)
    with pytest.raises(CheckpointError, match=message):
        read_layout(copy)
