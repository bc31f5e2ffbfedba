"""What `convert --with-ort-int8` adds to a bundle is verified like everything else in it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sa3_convert.bundle.manifest import FileEntry
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.bundle import verify_bundle
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, VerificationError
from sa3_convert.lab.generations.full import verify_fully
from sa3_convert.lab.generations.trajectory import GenerationCase
from sa3_convert.passes.integers import FLOORS_DB
from sa3_convert.runtime.engines import bundle_engine
from tests.bundles import Convert
from tests.check.test_bundle import rewrite

FOLDER = "onnxruntime-int8"


@pytest.fixture(scope="module")
def whole(converted: Convert, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("both") / "int8"
    converted(toy, "int8", out, with_ort_int8=True, with_reference=True)
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def replaced(folder: Path, change: Callable[[Path], None]) -> Bundle:
    """Change the DiT's integer form and make the manifest agree with the new file."""
    (path,) = folder.glob(f"**/{FOLDER}/dit.onnx")
    change(path)
    entries: dict[str, Any] = dict(FileEntry.of(folder, str(path.relative_to(folder))))
    data = path.with_name("dit.onnx.data")
    companion = dict(FileEntry.of(folder, str(data.relative_to(folder)))) if data.exists() else None
    return rewrite(folder, Component.DIT, "onnx-int8", **entries, companion=companion)


def test_each_component_has_a_verdict_for_each_engine(whole: Path) -> None:
    result = verify_bundle(Bundle.open(whole), quick=True, threads=2)
    result.check()
    assert [(v.component, v.engine) for v in result.verdicts] == [
        (component, engine) for component in Component for engine in ("mnn", "onnxruntime-int8")
    ]
    integer = {v.component: v for v in result.verdicts if v.engine == "onnxruntime-int8"}
    assert {c: v.floor_db for c, v in integer.items()} == FLOORS_DB
    assert integer[Component.DIT].precision == "int8"
    assert integer[Component.DIT].measured_db == pytest.approx(integer[Component.DIT].claimed_db, abs=0.05)


def test_whole_generations_can_run_on_it(whole: Path, tmp_path: Path) -> None:
    bundle, store = Bundle.open(whole), ReferenceStore(tmp_path)
    options: dict[str, Any] = {"cases": (GenerationCase(0, 0, 0.5),), "steps": 1, "quick": True, "store": store}
    mnn, integer = (
        verify_fully(bundle, engine=engine, components=(Component.DIT,), threads=2, **options)
        for engine in ("mnn", "onnxruntime-int8")
    )
    assert mnn.generations is not None
    assert integer.generations is not None
    assert integer.engine == "onnxruntime-int8"
    assert integer.generations != mnn.generations


def test_a_damaged_file_is_refused(copied: Path) -> None:
    (path,) = copied.glob(f"**/{FOLDER}/dit.onnx.data")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"dit\.onnx\.data"):
        verify_bundle(Bundle.open(copied), quick=True)


def test_the_reference_under_its_name_is_refused(copied: Path) -> None:
    def swap(path: Path) -> None:
        (reference,) = copied.glob("**/reference/dit.onnx")
        for suffix in ("", ".data"):
            shutil.copyfile(f"{reference}{suffix}", f"{path}{suffix}")

    with pytest.raises(VerificationError, match="0 integer products"):
        verify_bundle(replaced(copied, swap), quick=True)


def part_replaced(folder: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> Bundle:
    """Change one graph of the DiT in parts and make the manifest agree with the new file."""
    (path,) = folder.glob(f"**/{FOLDER}/dit.{name}.onnx")
    model = onnx.load(path, load_external_data=False)
    change(model)
    onnx.save(model, path)
    listed = Bundle.open(folder).artifact(Component.DIT, "onnx-int8").parts
    parts = [dict(FileEntry.of(folder, entry.path)) for entry in listed]
    return rewrite(folder, Component.DIT, "onnx-int8", parts=parts)


def test_a_part_that_is_rewritten_as_it_was_passes(copied: Path) -> None:
    bundle = part_replaced(copied, "step", lambda model: None)
    verify_bundle(bundle, components=(Component.DIT,), quick=True, threads=2).check()


def test_a_part_with_another_constant_is_refused(copied: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        small = next(one for one in model.graph.initializer if one.name == "integers.step")
        small.CopyFrom(numpy_helper.from_array(np.float32(0.5), small.name))

    with pytest.raises(VerificationError, match=r"integers\.step does not hold what"):
        verify_bundle(part_replaced(copied, "step", change), quick=True)


def test_a_part_that_takes_its_weights_from_elsewhere_in_the_file_is_refused(copied: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        offsets = [entry for one in model.graph.initializer for entry in one.external_data if entry.key == "offset"]
        offsets[0].value = offsets[-1].value if offsets[0].value != offsets[-1].value else offsets[1].value

    with pytest.raises(VerificationError, match=r"does not hold what|external data"):
        verify_bundle(part_replaced(copied, "prepare", change), quick=True)


def test_a_part_under_another_name_is_refused(copied: Path) -> None:
    parts = [dict(entry) for entry in Bundle.open(copied).artifact(Component.DIT, "onnx-int8").parts]
    with pytest.raises(BundleError, match="no part of"):
        rewrite(copied, Component.DIT, "onnx-int8", parts=[parts[0], parts[2], parts[1]])


def test_a_damaged_part_is_refused_before_it_runs(copied: Path) -> None:
    (path,) = copied.glob(f"**/{FOLDER}/dit.step.onnx")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"dit\.step\.onnx"):
        bundle_engine(Bundle.open(copied), "onnxruntime-int8", {})


def test_bytes_that_are_no_model_are_refused(copied: Path) -> None:
    with pytest.raises(VerificationError, match="cannot be read as ONNX"):
        verify_bundle(replaced(copied, lambda path: path.write_bytes(b"\xff" * 99) and None), quick=True)


def test_a_reference_that_is_no_model_is_refused(copied: Path) -> None:
    (reference,) = copied.glob("**/reference/dit.onnx")
    reference.write_bytes(b"\xff" * 99)
    entry: dict[str, Any] = dict(FileEntry.of(copied, str(reference.relative_to(copied))))
    with pytest.raises(VerificationError, match=r"reference/dit\.onnx cannot be read as ONNX"):
        verify_bundle(rewrite(copied, Component.DIT, "onnx", **entry), quick=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp32"}, "manifest calls it fp32, its maker makes int8"),
        ({"floor_db": 3.0}, "manifest's floor is 3 dB, its maker's 26 dB"),
    ],
)
def test_a_manifest_that_says_otherwise_is_refused(copied: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify_bundle(rewrite(copied, Component.DIT, "onnx-int8", **changes), quick=True)
