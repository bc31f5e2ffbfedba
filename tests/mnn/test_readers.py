"""What a file holds decides which MNN reads it, whatever it was converted for."""

from dataclasses import replace
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from sa3_convert.errors import BackendError, ConversionError
from sa3_convert.mnn.compatibility import check_reader, oldest_reader
from sa3_convert.mnn.converter import mnn_from_onnx
from sa3_convert.mnn.file.contents import ModelStorage
from sa3_convert.mnn.session import MnnSession
from sa3_convert.recipe import ComponentRecipe, WeightScheme
from tests.mnn.converted import gaussian, save_graph

FLOAT = ComponentRecipe(floor_db=1)
INT8 = ComponentRecipe(floor_db=1, weights=WeightScheme(bits=8))
HALF_SCALES = ComponentRecipe(floor_db=1, weights=WeightScheme(bits=8, scales="fp16"))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["up"]),
        helper.make_node("Sigmoid", ["up"], ["gate"]),
        helper.make_node("Add", ["gate", "up"], ["sum"]),
        helper.make_node("MatMul", ["sum", "w2"], ["out"]),
    ]
    constants = {"w1": gaussian(64, 128, seed=1), "w2": gaussian(128, 64, seed=2)}
    path = tmp_path_factory.mktemp("graph") / "network.onnx"
    return save_graph(path, nodes, {"x": (TensorProto.FLOAT, [1, 8, 64])}, ["out"], constants)


@pytest.fixture(scope="module")
def storage(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelStorage:
    return mnn_from_onnx(graph, tmp_path_factory.mktemp("model") / "network.mnn", FLOAT)


@pytest.mark.parametrize(("recipe", "version"), [(FLOAT, "3.0"), (INT8, "3.0"), (HALF_SCALES, "3.6")])
def test_storage_decides(graph: Path, tmp_path: Path, recipe: ComponentRecipe, version: str) -> None:
    assert oldest_reader(mnn_from_onnx(graph, tmp_path / "network.mnn", recipe)).version == version


@pytest.mark.parametrize(
    ("change", "version", "reason"),
    [
        ({"function": "silu"}, "3.1", "SiLU as one operator"),
        ({"function": "sigmoid"}, "3.0", ""),
        ({"parameter_kind": 101}, "3.5", "Shape with start or end"),
        ({"parameter_kind": 102}, "3.6.1", "RoPE as one operator"),
    ],
)
def test_an_operator_decides(storage: ModelStorage, change: dict[str, object], version: str, reason: str) -> None:
    first, *others = storage.operators
    reader = oldest_reader(replace(storage, operators=(replace(first, **change), *others)))  # type: ignore[arg-type]
    assert reader.version == version
    assert reason in str(reader)


def test_the_newest_of_several_decides(storage: ModelStorage) -> None:
    first, second, *others = storage.operators
    changed = (replace(first, parameter_kind=102), replace(second, function="silu"), *others)
    reader = oldest_reader(replace(storage, operators=changed))
    assert (reader.version, reader.because) == ("3.6.1", f"RoPE as one operator, in {first.name}")


def test_of_a_file_that_an_untried_version_wrote_only_what_is_known_is_said(storage: ModelStorage) -> None:
    old = oldest_reader(replace(storage, operators=(), mnn_version="2.8.1"))
    assert str(old) == "MNN 3.0 or newer (written by 2.8.1; before 3.0 nothing was tried)"
    assert str(oldest_reader(replace(storage, operators=(), mnn_version="3.0.0"))) == "MNN 3.0 or newer"
    assert str(oldest_reader(replace(storage, operators=(), mnn_version=None))) == "MNN 3.0 or newer"


@pytest.mark.parametrize(("target", "refused"), [("3.5", True), ("3.6", False)])
def test_what_the_target_cannot_read_is_refused_and_not_kept(
    graph: Path, tmp_path: Path, target: str, refused: bool
) -> None:
    made = tmp_path / "network.mnn"
    if refused:
        with pytest.raises(ConversionError, match=r"MNN 3\.5, but only MNN 3\.6 or newer \(FP16 scales, in "):
            mnn_from_onnx(graph, made, HALF_SCALES, target_mnn=target)  # type: ignore[arg-type]
    else:
        mnn_from_onnx(graph, made, HALF_SCALES, target_mnn=target)  # type: ignore[arg-type]
    assert made.exists() is not refused


@pytest.mark.parametrize(
    ("installed", "enough"), [("3.5.0", False), ("3.6.0", True), ("3.6.1-cuda", True), ("4", True)]
)
def test_a_session_wants_an_mnn_that_reads_the_file(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str, enough: bool
) -> None:
    mnn_from_onnx(graph, tmp_path / "network.mnn", HALF_SCALES)
    monkeypatch.setattr("MNN.version", lambda: installed)
    if enough:
        MnnSession(tmp_path / "network.mnn").close()
        return
    with pytest.raises(BackendError, match=r"needs MNN 3\.6 or newer \(FP16 scales, in .*3\.5\.0 is installed"):
        MnnSession(tmp_path / "network.mnn")


def test_a_target_that_is_new_enough_passes(storage: ModelStorage) -> None:
    check_reader(storage, "3.0")
    check_reader(storage, "3.6.1")
