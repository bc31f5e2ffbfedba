"""A large model is two files, `.mnn` and `.mnn.weight`: everywhere one artifact."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.inputs import sample_inputs
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, Sa3Error
from sa3_convert.mnn import converter
from sa3_convert.mnn.file.flatbuffer import weight_path
from sa3_convert.mnn.session import MnnSession
from sa3_convert.publish.export import export_bundles
from sa3_convert.runtime.engines import bundle_engine
from tests.bundles import Convert

PART = Component.DECODER


@pytest.fixture(scope="module")
def split(converted: Convert, toy: Path, toy_int8: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The toy's decoder in two files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, "EXTERNAL_FROM", 0)
        folder = tmp_path_factory.mktemp("split")
        cache = folder / "cache"
        cache.mkdir()
        shutil.copytree(toy_int8.file(PART, "onnx").parent, cache / "export" / toy_int8.file(PART, "onnx").parent.name)
        outcome, runs = converted(toy, "int8", folder / "bundle", components=(PART,), cache=cache)
    assert runs.done() == {("decoder", "mnn"), ("decoder", "verify")}
    return outcome.bundle


@pytest.fixture
def bundle(split: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(split.path, tmp_path / "copy", copy_function=shutil.copyfile)
    return Bundle.open(tmp_path / "copy")


def test_both_files_are_hashed_and_audited(split: Bundle, toy_int8: Bundle) -> None:
    artifact, single = split.artifact(PART), toy_int8.artifact(PART)
    assert artifact.companion is not None
    assert artifact.companion.path == "decoder.mnn.weight"
    assert artifact.companion.bytes > 10 * artifact.bytes
    assert single.companion is None
    assert artifact.storage is not None
    assert single.storage is not None
    assert artifact.storage["weight_file_bytes"] == artifact.companion.bytes
    assert [artifact.storage[what] for what in ("operators", "types", "weights")] == [
        single.storage[what] for what in ("operators", "types", "weights")
    ]
    assert artifact.fidelity == single.fidelity


def test_it_computes_what_one_file_does(split: Bundle, toy_int8: Bundle) -> None:
    feeds = sample_inputs(PART, split.layout, seed=0, latents=8).feeds
    results = []
    for path in (split.file(PART), toy_int8.file(PART)):
        with MnnSession(path, threads=1) as session:
            results.append(session.run(feeds)["audio"])
    np.testing.assert_array_equal(*results)


def test_a_missing_weight_file_is_refused_before_anything_runs(bundle: Bundle) -> None:
    weight_path(bundle.file(PART)).unlink()
    with pytest.raises(BundleError, match=r"decoder\.mnn\.weight is missing"):
        bundle.check(contents=False)
    with pytest.raises(Sa3Error), MnnSession(bundle.file(PART), threads=1) as session:
        session.run(sample_inputs(PART, bundle.layout, seed=0, latents=8).feeds)


def test_a_foreign_weight_file_is_refused(bundle: Bundle) -> None:
    path = weight_path(bundle.file(PART))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    bundle.check(contents=False)
    with pytest.raises(BundleError, match=r"decoder\.mnn\.weight is not the file"):
        bundle.check()


def test_a_weight_file_that_the_manifest_does_not_list_is_not_loaded(bundle: Bundle) -> None:
    alone = tuple(a.model_copy(update={"companion": None}) for a in bundle.manifest.artifacts)
    changed = Bundle(bundle.path, bundle.manifest.model_copy(update={"artifacts": alone}))
    with pytest.raises(BundleError, match=r"copy/decoder\.mnn keeps weights in a file that the manifest does not list"):
        bundle_engine(changed, "mnn", {}).load(PART)
    bundle_engine(bundle, "mnn", {}).load(PART)


def test_a_weight_file_that_is_replaced_while_the_model_is_used_is_told(bundle: Bundle) -> None:
    session = bundle_engine(bundle, "mnn", {"threads": 1}).load(PART)
    feeds = sample_inputs(PART, bundle.layout, seed=0, latents=8).feeds
    session.run(feeds)
    path = weight_path(bundle.file(PART))
    shutil.copyfile(path, path.with_name("other"))
    path.with_name("other").replace(path)
    with pytest.raises(BundleError, match=r"decoder\.mnn\.weight was replaced"):
        session.run(feeds)


def test_both_files_are_published_side_by_side(split: Bundle, tmp_path: Path) -> None:
    export_bundles([split], tmp_path / "out", "hub")
    Bundle.open(tmp_path / "out").check()
    (model,) = (tmp_path / "out").rglob("*.mnn")
    (contract,) = (tmp_path / "out").rglob("contract.json")
    told = json.loads(contract.read_text(encoding="utf-8"))
    weights = told["components"][PART.value]["weights"]
    assert (contract.parent / told["base"] / weights["file"]).resolve() == weight_path(model)
    assert weights["sha256"] == hashlib.sha256(weight_path(model).read_bytes()).hexdigest()
    assert weight_path(model).read_bytes() == weight_path(split.file(PART)).read_bytes()
    with MnnSession(model, threads=1) as session:
        assert session.run(sample_inputs(PART, split.layout, seed=0, latents=8).feeds)["audio"].any()


def test_a_missing_weight_file_is_put_back_and_a_useless_one_goes(
    converted: Convert, toy: Path, bundle: Bundle, split: Bundle
) -> None:
    weight_path(bundle.file(PART)).unlink()
    cache = split.path.parent / "cache"
    _, runs = converted(toy, "int8", bundle.path, components=(PART,), cache=cache)
    assert runs.done() == set()
    bundle.check()
    outcome, _ = converted(toy, "int8", bundle.path, components=(PART,), with_reference=True, force=True)
    assert outcome.bundle.artifact(PART).companion is None
    assert not weight_path(bundle.file(PART)).exists()
