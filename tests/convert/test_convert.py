"""A conversion does what is needed, once, and leaves nothing half-done under a final name."""

import json
import shutil
from pathlib import Path

import pytest

from sa3_convert.bundle.manifest import MANIFEST
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, ConversionError, UsageError, VerificationError
from sa3_convert.recipe import LayerRule, Recipe, WeightScheme, load_recipe
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.system.files import alone_in, sha256_file
from sa3_convert.system.log import kept
from tests.bundles import CONFIGS, Convert


def with_component(recipe: Recipe, component: Component, **changes: object) -> Recipe:
    changed = recipe.components[component].model_copy(update=changes)
    return recipe.model_copy(update={"components": dict(recipe.components) | {component: changed}})


@pytest.fixture
def out(toy_fp32: Bundle, tmp_path: Path) -> Path:
    """A copy of a finished bundle, free to be damaged."""
    folder = tmp_path / "bundle"
    shutil.copytree(toy_fp32.path, folder)
    # Where the reference stands is told relative to the bundle.
    manifest = json.loads((folder / MANIFEST).read_text())
    for artifact in manifest["artifacts"]:
        if artifact["kept_at"]:
            artifact["kept_at"] = str((toy_fp32.path / artifact["kept_at"]).resolve())
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", ["number_conditioner.mnn", "recipe.yaml", MANIFEST])
def test_a_conversion_does_not_write_through_links_out_of_its_folder(
    converted: Convert, toy: Path, toy_fp32: Bundle, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(outside)
    with pytest.raises(BundleError, match="leads out of"):
        converted(toy, "fp32", tmp_path / "out", components=(Component.NUMBER_CONDITIONER,))
    assert outside.read_text() == "precious"


def test_a_bundle_has_all_components_and_passes_its_own_check(toy_fp32: Bundle) -> None:
    toy_fp32.check(kinds=("mnn", "onnx"))
    assert toy_fp32.components == tuple(Component)
    assert toy_fp32.manifest.variant == "small-music"


def test_every_model_says_what_it_holds_and_how_close_it_is(toy_int8: Bundle) -> None:
    for component in Component:
        artifact = toy_int8.artifact(component)
        assert artifact.storage
        assert artifact.fidelity is not None
        assert artifact.floor_db is not None
        assert artifact.fidelity.signal_to_noise_db >= artifact.floor_db
        assert artifact.precision == "int8"


def test_the_bundle_keeps_the_resolved_recipe(toy_int8: Bundle) -> None:
    assert load_recipe(toy_int8.file(None, "recipe")) == load_recipe(CONFIGS / "int8.yaml")


def test_the_second_run_does_nothing(converted: Convert, toy: Path, out: Path) -> None:
    before = (out / MANIFEST).read_bytes()
    outcome, runs = converted(toy, "fp32", out)
    assert outcome.up_to_date
    assert runs.events == []
    assert (out / MANIFEST).read_bytes() == before


def test_a_touched_but_equal_checkpoint_is_up_to_date(converted: Convert, toy: Path, out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(toy, copy, copy_function=shutil.copyfile)
    assert converted(copy, "fp32", out)[0].up_to_date


def test_a_changed_line_redoes_only_what_depends_on_it(converted: Convert, toy: Path, out: Path) -> None:
    recipe = with_component(load_recipe(CONFIGS / "fp32.yaml"), Component.DECODER, floats="fp16", floor_db=50.0)
    outcome, runs = converted(toy, recipe, out)
    assert not outcome.up_to_date
    assert runs.done() == {("decoder", "mnn"), ("decoder", "verify")}


def test_what_the_converter_said_is_kept_and_told_when_its_result_is_used_again(
    converted: Convert, toy: Path, toy_fp32: Bundle, tmp_path: Path
) -> None:
    with kept() as lines:
        _, runs = converted(toy, "fp32", tmp_path / "again", components=(Component.ENCODER,))
    assert runs.done() == set()
    assert "kept: MNN's converter: Converted Success!" in lines


def test_a_changed_floor_is_only_verified_again(converted: Convert, toy: Path, out: Path) -> None:
    recipe = with_component(load_recipe(CONFIGS / "fp32.yaml"), Component.ENCODER, floor_db=80.0)
    _, runs = converted(toy, recipe, out)
    assert runs.done() == {("encoder", "verify")}


@pytest.mark.parametrize("name", ["decoder.mnn", MANIFEST])
def test_a_damaged_bundle_is_mended(converted: Convert, toy: Path, out: Path, name: str, toy_fp32: Bundle) -> None:
    (out / name).write_bytes(b"damaged")
    outcome, _ = converted(toy, "fp32", out)
    assert not outcome.up_to_date
    outcome.bundle.check(kinds=("mnn", "onnx"))
    assert sha256_file(out / "decoder.mnn") == toy_fp32.artifact(Component.DECODER).sha256


def test_a_missing_file_is_put_back_without_converting(converted: Convert, toy: Path, out: Path) -> None:
    (out / "dit.mnn").unlink()
    _, runs = converted(toy, "fp32", out)
    assert runs.done() == set()
    Bundle.open(out).check()


def test_a_model_below_its_floor_never_gets_its_name(converted: Convert, toy: Path, tmp_path: Path) -> None:
    recipe = with_component(load_recipe(CONFIGS / "int8.yaml"), Component.DECODER, floor_db=90.0)
    with pytest.raises(VerificationError, match="the floor is 90 dB"):
        converted(toy, recipe, tmp_path / "out", components=(Component.DECODER,))
    assert not (tmp_path / "out" / "decoder.mnn").exists()
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_layer_rule_that_matches_nothing_fails_by_name(converted: Convert, toy: Path, tmp_path: Path) -> None:
    scheme = WeightScheme(bits=8, layers=(LayerRule(match="no_such_layer", bits=4),))
    recipe = with_component(load_recipe(CONFIGS / "int8.yaml"), Component.DECODER, weights=scheme)
    with pytest.raises(ConversionError, match="no_such_layer"):
        converted(toy, recipe, tmp_path / "out", components=(Component.DECODER,))


def test_one_component_can_be_converted_alone_and_the_rest_added(converted: Convert, toy: Path, tmp_path: Path) -> None:
    first, _ = converted(toy, "fp32", tmp_path / "out", components=(Component.DECODER,))
    assert first.bundle.components == (Component.DECODER,)
    second, runs = converted(toy, "fp32", tmp_path / "out", components=(Component.ENCODER,))
    assert second.bundle.components == (Component.DECODER, Component.ENCODER)
    assert ("decoder", "mnn") not in runs.done()


def test_a_bundle_of_something_else_is_not_replaced_without_force(converted: Convert, toy: Path, out: Path) -> None:
    with pytest.raises(UsageError, match="--force"):
        converted(toy, "fp16", out)
    outcome, _ = converted(toy, "fp16", out, force=True, components=(Component.NUMBER_CONDITIONER,))
    assert outcome.bundle.manifest.recipe == "fp16"


def test_a_folder_with_other_files_is_left_alone(converted: Convert, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        converted(toy, "fp32", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_second_conversion_into_the_same_folder_is_refused(converted: Convert, toy: Path, out: Path) -> None:
    with alone_in(out), pytest.raises(UsageError, match="Another conversion"):
        converted(toy, "fp32", out)


def test_with_reference_the_bundle_can_be_moved_and_still_verified(
    converted: Convert, toy: Path, tmp_path: Path
) -> None:
    component = Component.NUMBER_CONDITIONER
    outcome, _ = converted(toy, "fp32", tmp_path / "out", components=(component,), with_reference=True)
    shutil.move(outcome.bundle.path, tmp_path / "moved")
    moved = Bundle.open(tmp_path / "moved")
    moved.check(kinds=("mnn", "onnx"))
    assert moved.file(component, "onnx").is_relative_to(tmp_path / "moved")


def test_an_autoencoder_alone_converts_and_is_not_run(converted: Convert, tmp_path: Path) -> None:
    synthesize(tmp_path / "same-l", "same-l")
    outcome, _ = converted(tmp_path / "same-l", "int8", tmp_path / "out", components=(Component.ENCODER,))
    assert (outcome.bundle.manifest.variant, outcome.bundle.components) == ("same-l", (Component.ENCODER,))
    with pytest.raises(BundleError, match="autoencoder alone"):
        Pipeline.from_bundle(outcome.bundle.path)
    with pytest.raises(UsageError, match="it has decoder, encoder"):
        converted(tmp_path / "same-l", "int8", tmp_path / "out", components=(Component.DIT,))
