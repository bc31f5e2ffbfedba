import json
from dataclasses import replace
from pathlib import Path

import pytest

from sa3_convert.checkpoint.config import read_layout
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.published import model_config, text_encoder_config
from sa3_convert.checkpoint.variants import (
    VARIANTS,
    Size,
    defaults_of,
    family_of,
    name_of,
    published_names,
    recognise,
    variant_named,
)
from sa3_convert.errors import UsageError
from tests.conftest import GOLDEN


def layout_of(name: str, folder: Path, size: Size = "toy") -> CheckpointLayout:
    variant = VARIANTS[name]
    (folder / "t5gemma-b-b-ul2").mkdir(exist_ok=True)
    (folder / "model_config.json").write_text(json.dumps(model_config(variant, size)))
    (folder / "t5gemma-b-b-ul2" / "config.json").write_text(json.dumps(text_encoder_config(variant, size)))
    return read_layout(folder)


@pytest.mark.parametrize("size", ["toy", "full"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_recognised_by_its_content(name: str, size: Size, tmp_path: Path) -> None:
    layout = layout_of(name, tmp_path, size)
    assert recognise(layout) == VARIANTS[name]
    assert name_of(layout) == name


def test_a_base_form_is_told_by_its_objective_though_it_names_the_post_trained_id(tmp_path: Path) -> None:
    base, tuned = layout_of("small-sfx-base", tmp_path), layout_of("small-sfx", tmp_path)
    assert base.source_id == tuned.source_id == "stabilityai/stable-audio-3-small-sfx"
    assert (name_of(base), name_of(tuned)) == ("small-sfx-base", "small-sfx")


def test_a_base_form_that_names_its_own_id_is_recognised_too(tmp_path: Path) -> None:
    layout = replace(layout_of("medium-base", tmp_path), source_id="stabilityai/stable-audio-3-medium-base")
    assert name_of(layout) == "medium-base"


def test_an_id_that_contradicts_the_construction_is_not_believed(tmp_path: Path) -> None:
    layout = replace(layout_of("small-music", tmp_path), source_id="stabilityai/stable-audio-3-medium")
    assert recognise(layout) is None
    assert name_of(layout) == "custom-small"


def test_a_foreign_checkpoint_is_custom() -> None:
    layout = read_layout(GOLDEN / "medium" / "checkpoint")
    assert recognise(layout) is None
    assert name_of(layout) == "custom-medium"
    assert name_of(replace(layout, objective="rectified_flow")) == "custom-medium-base"


def test_a_mixture_of_constructions_has_no_family(tmp_path: Path) -> None:
    small, medium = layout_of("small-music", tmp_path), layout_of("medium", tmp_path)
    mixed = replace(small, autoencoder=medium.autoencoder)
    assert family_of(mixed) is None
    assert name_of(mixed) == "custom-mixed"


def test_post_trained_models_take_eight_unguided_steps_and_base_models_fifty_guided(tmp_path: Path) -> None:
    tuned, base = (defaults_of(layout_of(name, tmp_path)) for name in ("small-music", "medium-base"))
    assert (tuned.sampler, tuned.steps, tuned.guidance) == ("pingpong", 8, 1.0)
    assert (base.sampler, base.steps, base.guidance) == ("euler", 50, 7.0)


def test_an_autoencoder_alone_has_no_defaults(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot generate"):
        defaults_of(layout_of("same-s", tmp_path))


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'large'; known: small-music, small-sfx, medium"):
        variant_named("large")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_longest_output_fits_and_is_whole_latents(name: str) -> None:
    variant = VARIANTS[name]
    assert variant.sample_size % 4096 == 0
    assert variant.max_seconds * 44100 <= variant.sample_size
    assert len(variant.revision) == 40
    assert (variant.objective == "rectified_flow") == name.endswith("-base")


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("small-music", ("music", "", "", "music")),
        ("small-music-base", ("music", "_base", "", "music")),
        ("small-sfx", ("sfx", "", "", "music")),
        ("medium", ("medium", "", "_medium", "medium")),
        ("medium-base", ("medium", "_base", "_medium", "medium")),
        ("same-s", ("same-s", "", "", "music")),
        ("same-l", ("same-l", "", "_medium", "medium")),
        ("custom-small", ("custom-small", "", "", "music")),
        ("custom-medium-base", ("custom-medium", "_base", "_medium", "medium")),
    ],
)
def test_published_names_follow_the_variant(variant: str, names: tuple[str, ...]) -> None:
    found = published_names(variant)
    assert (found.folder, found.base, found.codec, found.codec_folder) == names
