"""Published models without a manifest are run and measured, marked as unverified, and held to a checkpoint."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from sa3_convert.bundle.manifest import UNVERIFIED
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.results import BundleFidelity
from sa3_convert.checkpoint.published import published_layout
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.variants import VARIANTS
from sa3_convert.cli import app as cli
from sa3_convert.components import Component, contract
from sa3_convert.convert.reference import verify_against
from sa3_convert.errors import BundleError, VerificationError
from sa3_convert.mnn.converter import DEFAULT_CONVERTER
from sa3_convert.publish.export import Layout, export_bundles
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest

PUBLISHED = re.compile(r".*\.mnn|tokenizer\.json|bottleneck_params\.json")
SHORT = GenerateRequest("warm analog pad", seconds=0.3, seed=3, steps=2)


def without_manifest(bundle: Bundle, folder: Path, layout: Layout) -> Path:
    """Return a tree as others publish it: models and what is read beside them."""
    export_bundles([bundle], folder, layout)
    for path in folder.rglob("*"):
        if path.is_file() and not PUBLISHED.fullmatch(path.name):
            path.unlink()
    return folder


@pytest.fixture
def tree(toy_int8: Bundle, tmp_path: Path) -> Path:
    return without_manifest(toy_int8, tmp_path / "tree", "hub")


@pytest.mark.parametrize(("layout", "inner"), [("hub", ""), ("hub", "music/int8"), ("flat", ""), ("flat", "music")])
def test_it_makes_the_samples_of_the_bundle_with_the_same_models(
    toy_int8: Bundle, tmp_path: Path, layout: Layout, inner: str
) -> None:
    folder = without_manifest(toy_int8, tmp_path / "tree", layout) / inner
    made = []
    for path in (toy_int8.path, folder):
        with Pipeline.from_bundle(path) as pipeline:
            made.append(pipeline.generate(SHORT).audio)
    np.testing.assert_array_equal(*made)
    opened = Bundle.open(folder)
    assert opened.is_foreign
    assert opened.manifest.variant == "small-music"
    for component in Component:
        assert contract(component, opened.layout) == contract(component, toy_int8.layout)
        assert opened.artifact(component).precision == toy_int8.artifact(component).precision
    text, own = opened.layout.text_encoder, toy_int8.layout.text_encoder
    assert text is not None
    assert own is not None
    assert text.vocab_size == own.vocab_size


def test_every_command_marks_it(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    wav, short = str(tmp_path / "x.wav"), ["--seconds", "0.3", "--steps", "1"]
    for words in (
        ["run", str(tree), "--prompt", "pad", *short, "-o", wav, "--json", str(figures)],
        ["inspect", str(tree), "--json", str(figures)],
        ["table", str(tree)],
        ["bench", str(tree), "--engine", "mnn", *short, "--repeats", "1", "--no-peak-memory", "--json", str(figures)],
    ):
        assert cli.run(words) == 0
        shown = capsys.readouterr()
        assert shown.err.count(f"{UNVERIFIED}: {tree} has no manifest") == 1
        assert words[0] == "table" or json.loads(figures.read_text())["recipe"] == UNVERIFIED
    assert cli.run(["verify", str(tree)]) == 2
    assert "Give its checkpoint: --checkpoint DIR" in " ".join(capsys.readouterr().err.split())


def test_of_two_text_encoders_the_smaller_is_taken(tree: Path) -> None:
    encoder = tree / "shared" / "text_encoder_int8.mnn"
    larger = encoder.with_name("text_encoder.mnn")
    larger.write_bytes(encoder.read_bytes() + bytes(64))
    assert Bundle.open(tree).artifact(Component.TEXT_ENCODER).path == "shared/text_encoder_int8.mnn"
    encoder.unlink()
    assert Bundle.open(tree).artifact(Component.TEXT_ENCODER).path == "shared/text_encoder.mnn"


def test_several_dits_are_told_apart_by_their_folders(tree: Path) -> None:
    shutil.copytree(tree / "music", tree / "sfx")
    (tree / "sfx" / "int8" / "dit_music_int8.mnn").rename(tree / "sfx" / "int8" / "dit_sfx_int8.mnn")
    with pytest.raises(BundleError, match=r"2 DiTs.*music/int8.*sfx/int8"):
        Bundle.open(tree)
    assert Bundle.open(tree / "sfx" / "int8").manifest.variant == "small-sfx"


def test_links_out_of_the_tree_are_refused(tree: Path, tmp_path: Path) -> None:
    decoder = tree / "shared" / "decoder_fused_wn.mnn"
    decoder.rename(tmp_path / "decoder.mnn")
    decoder.symlink_to(tmp_path / "decoder.mnn")
    with pytest.raises(BundleError, match="leads out of"):
        Bundle.open(tree)


def plain_encoder(reference: Path, folder: Path) -> Path:
    """Return an encoder's graph with its weight norm as torch's exporter writes it."""
    model = onnx.load(reference, format="protobuf")
    graph = model.graph
    conv = next(node for node in graph.node if node.op_type == "Conv")
    v, g = (name for name in ("layers.0.mapping.weight_v", "layers.0.mapping.weight_g"))
    assert {v, g} <= {initializer.name for initializer in graph.initializer}
    graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.int64), "axes"))
    conv.input[1] = "w"
    nodes = [
        helper.make_node("ReduceL2", [v, "axes"], ["n"], keepdims=1),
        helper.make_node("Div", [v, "n"], ["u"]),
        helper.make_node("Mul", [g, "u"], ["w"]),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)
    onnx.save(model, folder / "encoder.onnx", format="protobuf")
    return folder / "encoder.onnx"


@pytest.fixture
def as_the_card_says(toy_int8: Bundle, tree: Path, tmp_path: Path) -> Path:
    """The tree with text encoder and encoder as the plain flags of the published card make them."""
    own = tmp_path / "scratch"
    own.mkdir()
    references = {c: toy_int8.checked(c, "onnx").path for c in (Component.TEXT_ENCODER, Component.ENCODER)}
    references[Component.ENCODER] = plain_encoder(references[Component.ENCODER], tmp_path)
    (tree / "shared" / "text_encoder_int8.mnn").unlink()
    for source, target, flags in (
        (references[Component.TEXT_ENCODER], "shared/text_encoder_int4.mnn", ["--weightQuantBits", "4", "--fp16"]),
        (references[Component.ENCODER], "music/int8/encoder_int8.mnn", ["--weightQuantBits", "8"]),
    ):
        made = own / "made.mnn"
        DEFAULT_CONVERTER.run(
            ["-f", "ONNX", "--modelFile", str(source.resolve()), "--MNNModel", str(made), *flags], own
        )
        made.replace(tree / target)
    return tree


def against(tree: Path, toy: Path, *components: Component) -> BundleFidelity:
    return verify_against(Bundle.open(tree), Checkpoint.open(toy), components=components, quick=True, threads=2)


def test_a_checkpoint_shows_what_the_plain_flags_make(as_the_card_says: Path, toy: Path) -> None:
    found = against(as_the_card_says, toy, Component.TEXT_ENCODER, Component.ENCODER)
    name, norm = found.contradictions
    assert name == "text_encoder_int4.mnn calls itself INT4, its weights are FP16."
    assert norm.startswith("music/int8/encoder_int8.mnn: its weight norm was not fused before conversion")
    text, encoder = found.verdicts
    assert text.precision == "fp16"
    assert text.worst.signal_to_noise_db > 50
    assert encoder.precision == "int8"
    with pytest.raises(VerificationError, match=r"calls itself INT4(.|\n)*not fused"):
        found.check()


def test_models_that_are_what_they_say_pass(tree: Path, toy: Path) -> None:
    found = against(tree, toy, Component.NUMBER_CONDITIONER, Component.ENCODER)
    assert found.problems == ()
    assert (found.bundle, found.recipe) == ("small-music", UNVERIFIED)
    assert all(verdict.worst.signal_to_noise_db > 30 for verdict in found.verdicts)


def test_another_checkpoint_is_refused(tree: Path, toy: Path) -> None:
    bundle = Bundle.open(tree)
    larger = bundle.manifest.model_copy(update={"layout": published_layout(VARIANTS["small-music"], "full")})
    with pytest.raises(VerificationError, match="has other dimensions"):
        verify_against(Bundle(bundle.path, larger), Checkpoint.open(toy), components=(Component.DECODER,))
