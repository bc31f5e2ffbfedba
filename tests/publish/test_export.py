"""Bundles come out under the names of the published tree, with all that says what they are, and open again."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3_convert.bundle.manifest import Artifact, FileEntry, LoraEntry
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, UsageError
from sa3_convert.publish.export import Layout, export_bundles
from sa3_convert.publish.names import published_path
from sa3_convert.system.files import sha256_file
from tests.bundle.test_manifest import lora_entry, make_bundle, origin_of, weights_apart, with_loras

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


DOCUMENTS = {"README.md", "NOTICE", "SHA256SUMS", "manifest.json", "recipe.yaml", "contract.json"}


def tree(folder: Path) -> set[str]:
    """Return what a client looks for: models and what it reads beside them."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in DOCUMENTS)
    return {p.relative_to(folder).as_posix() for p in found}


@pytest.fixture
def four(tmp_path: Path) -> list[Bundle]:
    return [
        make_bundle(tmp_path / f"{variant}-{precision}", variant, precision)
        for variant in ("small-music", "small-sfx")
        for precision in ("int8", "fp16")
    ]


def test_four_bundles_make_the_published_tree_and_the_second_decoder_says_its_precision(
    four: list[Bundle], tmp_path: Path
) -> None:
    export_bundles(four, tmp_path / "hub", "hub")
    assert tree(tmp_path / "hub") == PUBLISHED_TREE | {"shared/decoder_fused_wn_fp16.mnn"}
    assert (tmp_path / "hub" / "shared" / "decoder_fused_wn.mnn").read_text() == "decoder int8 "


@pytest.mark.parametrize("layout", ["hub", "flat"])
def test_what_was_exported_opens_as_the_bundles_that_were_handed_in(
    four: list[Bundle], tmp_path: Path, layout: Layout
) -> None:
    export_bundles(four, tmp_path / "out", layout)
    with pytest.raises(BundleError, match=r"holds 4 bundles\. Name one: "):
        Bundle.open(tmp_path / "out")
    opened = [Bundle.open(file.parent) for file in (tmp_path / "out").rglob("manifest.json")]
    assert len(opened) == len(four)
    for bundle in opened:
        bundle.check()
        label = bundle.manifest.label, bundle.artifact(Component.DIT).precision
        (given,) = (b for b in four if (b.manifest.label, b.artifact(Component.DIT).precision) == label)
        for component in Component:
            assert bundle.checked(component).sha256 == given.checked(component).sha256
            assert bundle.file(component).read_bytes() == given.file(component).read_bytes()


@pytest.mark.parametrize("layout", ["hub", "flat"])
def test_the_only_bundle_of_a_tree_is_found_in_it(tmp_path: Path, layout: Layout) -> None:
    bundle = make_bundle(tmp_path / "b")
    export_bundles([bundle], tmp_path / "out", layout)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "link"):
        found = Bundle.open(folder)
        found.check()
        assert all(path.is_file() for path in found.all_files())
        assert found.manifest.variant == "small-music"


@pytest.mark.parametrize("layout", ["hub", "flat"])
def test_all_that_was_written_is_in_the_sums_and_licences_are_with_it(
    four: list[Bundle], tmp_path: Path, layout: Layout
) -> None:
    export_bundles(four, tmp_path / "out", layout)
    roots = [file.parent for file in (tmp_path / "out").rglob("SHA256SUMS")]
    assert len(roots) == (1 if layout == "hub" else 4)
    for root in roots:
        lines = dict(reversed(line.split("  ")) for line in (root / "SHA256SUMS").read_text().splitlines())
        files = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} - {"SHA256SUMS"}
        assert lines == {name: sha256_file(root / name) for name in files}
        notice = (root / "NOTICE").read_text()
        assert "Stability AI Community License" in notice
        assert "ai.google.dev/gemma/terms" in notice


def test_an_export_replaces_an_earlier_one_alone_and_only_when_asked(tmp_path: Path) -> None:
    bundle, out = make_bundle(tmp_path / "b"), tmp_path / "out"
    export_bundles([bundle], out, "hub", force=True)
    with pytest.raises(UsageError, match="not empty"):
        export_bundles([bundle], out, "hub")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert export_bundles([bundle], out, "hub", force=True).up_to_date
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (out / "shared" / "decoder_fused_wn.mnn").write_bytes(b"decoder int8 ".upper())
    assert not export_bundles([bundle], out, "hub", force=True).up_to_date
    assert not export_bundles([make_bundle(tmp_path / "c", precision="fp16")], out, "flat", force=True).up_to_date
    assert {path.name for path in out.iterdir()} == {"music"}
    (out / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        export_bundles([bundle], out, "hub", force=True)
    assert (out / "diary.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_not_published_is_told(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    (bundle.path / "dit.onnx").write_text("reference")
    extra = Artifact(**dict(FileEntry.of(bundle.path, "dit.onnx")), kind="onnx", component=Component.DIT)
    artifacts = (*bundle.manifest.artifacts, extra)
    more = Bundle(bundle.path, bundle.manifest.model_copy(update={"artifacts": artifacts}))
    (line,) = export_bundles([more], tmp_path / "out", "hub").left_out
    assert line == f"{bundle.path}: not published are its files of kind onnx."


@pytest.mark.parametrize("layout", ["hub", "flat"])
def test_a_tokenizers_table_lies_beside_it(tmp_path: Path, layout: Layout) -> None:
    bundle = make_bundle(tmp_path / "b")
    (bundle.path / "tokenizer.table").write_text("table")
    table = FileEntry.of(bundle.path, "tokenizer.table")
    given = [a.model_copy(update={"table": table}) if a.kind == "tokenizer" else a for a in bundle.manifest.artifacts]
    with_table = Bundle(bundle.path, bundle.manifest.model_copy(update={"artifacts": tuple(given)}))
    export_bundles([with_table], tmp_path / "out", layout)
    (found,) = (tmp_path / "out").rglob("tokenizer.*le")
    assert (found.read_text(), found.with_suffix(".json").is_file()) == ("table", True)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".weight")]
    exported = Bundle.open(tmp_path / "out")
    exported.check()
    assert exported.artifact(None, "tokenizer").table is not None


def test_the_text_encoder_is_called_int4_only_when_it_is() -> None:
    path = published_path("small-music", Component.TEXT_ENCODER, "int4")
    assert path == "shared/text_encoder_int4.mnn"
    assert published_path("small-music", Component.TEXT_ENCODER, "int8") != path


def test_contradicting_models_of_one_name_are_refused(tmp_path: Path) -> None:
    bundles = [make_bundle(tmp_path / salt, salt=salt) for salt in ("a", "b")]
    with pytest.raises(BundleError, match="different contents"):
        export_bundles(bundles, tmp_path / "hub", "hub")
    assert not (tmp_path / "hub").exists()


def test_the_weights_of_one_graph_may_contradict_too(tmp_path: Path) -> None:
    bundles = [weights_apart(make_bundle(tmp_path / weights), weights.encode()) for weights in ("a", "b")]
    assert len({bundle.artifact(Component.DIT).sha256 for bundle in bundles}) == 1
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


def adapted(folder: Path, *loras: LoraEntry) -> Bundle:
    """A bundle in which what adapters change has other content than in the plain one."""
    changed = {component for lora in loras for component in lora.layers}
    salt = "".join(lora.sha256[0] + str(lora.strength) for lora in loras)
    plain = make_bundle(folder, digests={c.value: salt if c in changed else "plain" for c in Component})
    artifacts = []
    for artifact in plain.manifest.artifacts:
        if artifact.component in changed:
            (folder / artifact.path).write_text(f"{artifact.path} {salt}")
        artifacts.append(artifact.model_copy(update=dict(FileEntry.of(folder, artifact.path))))
    whole = Bundle(folder, plain.manifest.model_copy(update={"artifacts": tuple(artifacts)}))
    return with_loras(whole, *loras)


def test_bundles_with_other_loras_lie_beside_the_plain_one_and_share_what_is_the_same(tmp_path: Path) -> None:
    everything = dict.fromkeys(Component, 1)
    sets = {
        "plain": (),
        "dit": (lora_entry(),),
        "stronger": (lora_entry(strength=1.0),),
        "namesake": (lora_entry(content="b"),),
        "both": (lora_entry(), lora_entry("Bright & shiny!.safetensors", "c")),
        "all": (lora_entry("x.safetensors", "d", layers=everything),),
    }
    bundles = [adapted(tmp_path / name, *loras) for name, loras in sets.items()]
    export_bundles(bundles[:1], tmp_path / "alone", "hub")
    export_bundles(bundles, tmp_path / "hub", "hub")
    plain, names = tree(tmp_path / "alone"), tree(tmp_path / "hub")
    assert plain == {name for name in PUBLISHED_TREE if "sfx" not in name and "fp16" not in name} - {
        "shared/text_encoder.mnn"
    }
    assert plain <= names
    assert len(names - plain) == len(("dit", "stronger", "namesake", "both")) + len(Component)
    for name in plain:
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    dits = [name for name in names - plain if "dit_" in name]
    assert len({(tmp_path / "hub" / name).read_bytes() for name in dits}) == len(dits) == 5
    assert any(re.fullmatch(r"(music_warm-bright-shiny-[0-9a-f]{12})/int8/dit_\1_int8\.mnn", name) for name in dits)
    export_bundles(bundles, tmp_path / "flat", "flat")
    folders = {path.name for path in (tmp_path / "flat").iterdir()}
    assert len(folders) == len(bundles)
    assert "music" in folders
    assert all((tmp_path / "flat" / folder / "dit_music_int8.mnn").is_file() for folder in folders)


@pytest.mark.parametrize("component", Component)
def test_what_a_lora_changes_never_passes_for_the_plain_model(tmp_path: Path, component: Component) -> None:
    export_bundles([make_bundle(tmp_path / "plain")], tmp_path / "hub", "hub")
    alone = adapted(tmp_path / "bundle", lora_entry(layers={component: 1}))
    export_bundles([alone], tmp_path / "adapted", "hub")
    (missing,) = tree(tmp_path / "hub") - tree(tmp_path / "adapted")
    (tagged,) = tree(tmp_path / "adapted") - tree(tmp_path / "hub")
    assert Path(missing).name.startswith(component.value)
    assert Path(tagged).name.startswith(f"{component.value}_music_warm-")


def test_a_lora_without_effect_leaves_the_plain_names(tmp_path: Path) -> None:
    export_bundles([adapted(tmp_path / "b", lora_entry(strength=0, layers={}))], tmp_path / "hub", "hub")
    assert "music/int8/dit_music_int8.mnn" in tree(tmp_path / "hub")


@given(st.lists(st.text(min_size=1, max_size=300).map("{}.safetensors".format), min_size=1, max_size=8))
def test_names_of_lora_files_add_letters_digits_and_hyphens_alone(names: list[str]) -> None:
    loras = [lora_entry(name) for name in names]
    path = published_path("small-music", Component.DIT, "int8", loras=loras)
    assert re.fullmatch(r"(music_[a-z0-9-]+-[0-9a-f]{12})/int8/dit_\1_int8\.mnn", path)
    assert len(path) < 250
