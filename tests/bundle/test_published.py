"""Bundles come out under exactly the names that the published tree and its client use."""

from pathlib import Path

import pytest

from sa3_convert.bundle.manifest import Bundle, FileEntry
from sa3_convert.bundle.published import export_bundles, published_path
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, UsageError
from tests.bundle.test_manifest import make_bundle, origin_of

PUBLISHED_TREE = {
    "music/int8/dit_music_int8.mnn",
    "music/int8/encoder_int8.mnn",
    "music/int8/number_conditioner_music_int8.mnn",
    "music/fp16/dit_music_fp16_v2_f32io.mnn",
    "music/fp16/encoder.mnn",
    "music/fp16/number_conditioner_music_fp16.mnn",
    "sfx/int8/dit_sfx_int8.mnn",
    "sfx/int8/number_conditioner_sfx_int8.mnn",
    "sfx/fp16/dit_sfx_fp16_v2_f32io.mnn",
    "sfx/fp16/number_conditioner_sfx_fp16.mnn",
    "shared/decoder_fused_wn.mnn",
    "shared/text_encoder.mnn",
    "shared/text_encoder_int8.mnn",
    "shared/tokenizer.json",
    "shared/bottleneck_params.json",
}


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_four_bundles_make_the_published_tree(tmp_path: Path) -> None:
    bundles = [
        make_bundle(tmp_path / f"{variant}-{precision}", variant, precision)
        for variant in ("small-music", "small-sfx")
        for precision in ("int8", "fp16")
    ]
    # int8 and fp16 decoders differ; the one of fewer bits takes the published name.
    export_bundles(bundles, tmp_path / "hub", "hub")
    assert tree(tmp_path / "hub") == PUBLISHED_TREE


def test_the_text_encoder_is_called_int4_only_when_it_is() -> None:
    path = published_path("small-music", Component.TEXT_ENCODER, "int4")
    assert path == "shared/text_encoder_int4.mnn"
    assert published_path("small-music", Component.TEXT_ENCODER, "int8") != path


def test_the_flat_layout_has_the_same_names_in_one_folder(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    export_bundles([bundle], tmp_path / "flat", "flat")
    assert {p.name for p in (tmp_path / "flat").iterdir()} == {
        "dit_music_int8.mnn",
        "encoder_int8.mnn",
        "number_conditioner_music_int8.mnn",
        "decoder_fused_wn.mnn",
        "text_encoder_int8.mnn",
        "tokenizer.json",
        "bottleneck_params.json",
    }


def test_contradicting_models_of_one_name_are_refused(tmp_path: Path) -> None:
    bundles = [make_bundle(tmp_path / salt, salt=salt) for salt in ("a", "b")]
    with pytest.raises(BundleError, match="different contents"):
        export_bundles(bundles, tmp_path / "hub", "hub")
    assert not (tmp_path / "hub").exists()


def test_variants_with_text_encoders_of_their_own_keep_them_apart(tmp_path: Path) -> None:
    bundles = [
        make_bundle(tmp_path / v, v, salt=v, digests={"text_encoder": v, "decoder": v, "encoder": v})
        for v in ("small-music", "small-sfx")
    ]
    export_bundles(bundles, tmp_path / "hub", "hub")
    names = tree(tmp_path / "hub")
    assert {"music/int8/text_encoder_music_int8.mnn", "sfx/int8/text_encoder_sfx_int8.mnn"} <= names
    assert "shared/text_encoder_int8.mnn" not in names
    for variant, family in (("small-music", "music"), ("small-sfx", "sfx")):
        published = (tmp_path / "hub" / family / "int8" / f"text_encoder_{family}_int8.mnn").read_bytes()
        assert published == (tmp_path / variant / "text_encoder.mnn").read_bytes()


def test_a_target_with_files_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    with pytest.raises(UsageError, match="not empty"):
        export_bundles([bundle], tmp_path / "b", "hub")


def test_a_damaged_bundle_is_not_published(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    (tmp_path / "b" / "dit.mnn").write_bytes(b"else")
    with pytest.raises(BundleError):
        export_bundles([bundle], tmp_path / "hub", "hub")
    assert not (tmp_path / "hub").exists()


def test_base_models_do_not_take_the_names_of_post_trained_ones() -> None:
    base = published_path("small-music-base", Component.DIT, "int8")
    assert base != published_path("small-music", Component.DIT, "int8")


CODEC = ("decoder", "encoder")


def of_variant(tmp_path: Path, variant: str) -> Bundle:
    """A bundle whose autoencoder is its family's and whose text encoder is its own."""
    codec = "l" if variant in ("medium", "medium-base", "same-l") else "s"
    bundle = make_bundle(tmp_path / variant, variant, salt=codec, digests=dict.fromkeys(CODEC, codec))
    for component in (Component.TEXT_ENCODER, Component.DIT, Component.NUMBER_CONDITIONER):
        (bundle.path / f"{component.value}.mnn").write_text(f"{component.value} of {variant}")
    digests = dict.fromkeys(CODEC, codec) | {"text_encoder": variant}
    (bundle.path / "bottleneck_params.json").write_text(codec)
    artifacts = [a.model_copy(update=dict(FileEntry.of(bundle.path, a.path))) for a in bundle.manifest.artifacts]
    changes = {"checkpoint": origin_of(digests), "artifacts": tuple(artifacts)}
    changed = Bundle(bundle.path, bundle.manifest.model_copy(update=changes))
    changed.write()
    return changed


def test_each_family_has_its_autoencoder_once(tmp_path: Path) -> None:
    variants = ("small-music", "small-sfx", "small-music-base", "medium", "medium-base")
    export_bundles([of_variant(tmp_path, variant) for variant in variants], tmp_path / "hub", "hub")
    names = tree(tmp_path / "hub")
    assert {name for name in names if "decoder" in name or "/encoder" in name or "bottleneck" in name} == {
        "shared/decoder_fused_wn.mnn",
        "shared/decoder_medium_fused_wn.mnn",
        "music/int8/encoder_int8.mnn",
        "medium/int8/encoder_medium_int8.mnn",
        "shared/bottleneck_params.json",
        "shared/bottleneck_params_medium.json",
    }
    assert len([name for name in names if "text_encoder" in name]) == len(variants)
    assert len([name for name in names if "dit_" in name]) == len(variants)
    assert (tmp_path / "hub" / "shared" / "decoder_medium_fused_wn.mnn").read_text() == "decoder int8 l"


def test_all_families_fit_one_flat_folder(tmp_path: Path) -> None:
    bundles = [of_variant(tmp_path, variant) for variant in ("small-music", "medium")]
    published = export_bundles(bundles, tmp_path / "flat", "flat")
    names = {path.name for path in (tmp_path / "flat").iterdir()}
    assert len(names) == len(published) == 2 * len(Component) + 3
    assert {"encoder_int8.mnn", "encoder_medium_int8.mnn"} <= names


def test_files_of_one_name_are_not_laid_over_one_another(tmp_path: Path) -> None:
    fp16, fp32 = (make_bundle(tmp_path / precision, precision=precision) for precision in ("fp16", "fp32"))
    with pytest.raises(BundleError, match=r"cannot hold both encoder\.mnn.*--layout hub"):
        export_bundles([fp16, fp32], tmp_path / "flat", "flat")
    export_bundles([fp16, fp32], tmp_path / "hub", "hub")
