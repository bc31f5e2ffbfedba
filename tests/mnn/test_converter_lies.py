"""What MNN's converter does when asked for the impossible, and that `mnn_from_onnx` is not taken in.

The first test of each pair talks to the converter itself: when one of them fails, a new version of MNN has become more
honest, and the guard beside it may be reconsidered.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sa3_convert.errors import ConversionError
from sa3_convert.mnn import converter
from sa3_convert.mnn.converter import DEFAULT_CONVERTER, _fp16_pass, mnn_from_onnx
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.mnn.isolated import run_worker
from sa3_convert.mnn.session import MnnSession
from sa3_convert.recipe import ComponentRecipe, WeightScheme
from tests.mnn.perceptron import feeds, write_perceptron

FLOAT = ComponentRecipe(floor_db=100)
SUCCESS = "Converted Success!"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_perceptron(tmp_path_factory.mktemp("onnx") / "perceptron.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir()
    return path


def convert(source: Path, target: Path, folder: Path, *flags: str) -> str:
    return run_worker(
        ["convert", "-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), *flags], folder, timeout=60
    )


def weight_types(model: Path) -> set[str]:
    return {weight.type for _, weight in read_storage(model).weighted()}


def test_the_converter_ends_normally_without_an_input(folder: Path) -> None:
    convert(folder / "absent.onnx", folder / "out.mnn", folder)


def test_a_missing_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"absent\.onnx does not exist"):
        mnn_from_onnx(tmp_path / "absent.onnx", tmp_path / "out.mnn", FLOAT)


def test_the_converter_ends_normally_on_a_truncated_graph(source: Path, folder: Path) -> None:
    (folder / "cut.onnx").write_bytes(source.read_bytes()[:300])
    convert(folder / "cut.onnx", folder / "out.mnn", folder)


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_graph_is_refused(source: Path, tmp_path: Path, part: float) -> None:
    content = source.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: int(len(content) * part)])
    (tmp_path / f"{source.name}.data").write_bytes(source.with_name(f"{source.name}.data").read_bytes())
    with pytest.raises(ConversionError, match=r"cut\.onnx.*truncated"):
        mnn_from_onnx(tmp_path / "cut.onnx", tmp_path / "out.mnn", FLOAT)


def test_the_converter_claims_success_for_a_folder_that_does_not_exist(source: Path, folder: Path) -> None:
    assert SUCCESS in convert(source, folder / "absent" / "out.mnn", folder)
    assert not (folder / "absent").exists()


def test_a_folder_that_does_not_exist_is_made(source: Path, tmp_path: Path) -> None:
    mnn_from_onnx(source, tmp_path / "new" / "folder" / "out.mnn", FLOAT)
    assert MnnSession(tmp_path / "new" / "folder" / "out.mnn", threads=1).run(feeds())


def test_an_output_below_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="file"):
        mnn_from_onnx(source, tmp_path / "file" / "out.mnn", FLOAT)


def test_the_converter_takes_a_flag_that_it_does_not_know_and_ends_normally(source: Path, folder: Path) -> None:
    convert(source, folder / "out.mnn", folder, "--noSuchFlag", "1")


def test_the_converter_claims_success_with_99_bits(source: Path, folder: Path) -> None:
    convert(source, folder / "out.mnn", folder, "--weightQuantBits", "99")


def test_a_recipe_cannot_ask_for_99_bits() -> None:
    with pytest.raises(ValueError, match="bits"):
        WeightScheme(bits=99)


def test_the_converter_drops_the_quantisation_when_fp16_is_asked_for_at_once(source: Path, folder: Path) -> None:
    assert SUCCESS in convert(source, folder / "out.mnn", folder, "--weightQuantBits", "8", "--fp16")
    assert weight_types(folder / "out.mnn") == {"fp16"}


def test_integer_weights_beside_fp16_floats_are_both_there(source: Path, tmp_path: Path) -> None:
    recipe = ComponentRecipe(weights=WeightScheme(bits=8), floats="fp16", floor_db=30)
    mnn_from_onnx(source, tmp_path / "out.mnn", recipe)
    storage = read_storage(tmp_path / "out.mnn")
    assert weight_types(tmp_path / "out.mnn") == {"int8"}
    assert {constant.type for constant in storage.constants if constant.is_float} == {"fp16"}


@pytest.mark.parametrize(("flags", "symmetric"), [((), False), (("--weightQuantAsymmetric",), True)])
def test_the_converters_help_is_wrong_about_what_is_symmetric(
    source: Path, folder: Path, flags: Sequence[str], symmetric: bool
) -> None:
    convert(source, folder / "out.mnn", folder, "--weightQuantBits", "8", *flags)
    assert {weight.symmetric for _, weight in read_storage(folder / "out.mnn").weighted()} == {symmetric}


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_recipe_gets_the_symmetry_that_it_asks_for(source: Path, tmp_path: Path, symmetric: bool) -> None:
    recipe = ComponentRecipe(weights=WeightScheme(bits=4, symmetric=symmetric), floor_db=10)
    mnn_from_onnx(source, tmp_path / "out.mnn", recipe)
    assert {weight.symmetric for _, weight in read_storage(tmp_path / "out.mnn").weighted()} == {symmetric}


def half_precision(path: Path) -> Path:
    """Write y = x · (a half-precision weight, cast to float), the weight as external data."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    graph = helper.make_graph(
        [helper.make_node("Cast", ["half"], ["weight"], to=1), helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "T", 64])],
        [numpy_helper.from_array(weight, "half")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


def test_the_converter_misreads_half_precision_external_data(folder: Path) -> None:
    source = half_precision(folder / "half.onnx")
    assert SUCCESS in convert(source, folder / "out.mnn", folder)
    weight = np.fromfile(folder / "half.onnx.data", np.float16).reshape(64, 64)
    result = MnnSession(folder / "out.mnn", threads=1).run({"x": np.eye(64, dtype=np.float32)[None]})["y"]
    # What it reads may also be no number.
    assert not np.allclose(result[0], weight, atol=1)


def test_half_precision_external_data_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="'half' is FLOAT16 external data"):
        mnn_from_onnx(half_precision(tmp_path / "half.onnx"), tmp_path / "out.mnn", FLOAT)


def test_the_converter_loses_an_output_that_an_activation_is_fused_into(folder: Path) -> None:
    source = write_perceptron(folder / "relu.onnx", activation="Relu")
    assert SUCCESS in convert(source, folder / "out.mnn", folder)
    assert MnnSession(folder / "out.mnn").outputs == ("z",)


def test_a_lost_output_is_named(tmp_path: Path) -> None:
    source = write_perceptron(tmp_path / "relu.onnx", activation="Relu")
    with pytest.raises(ConversionError, match="output 'y' is gone"):
        mnn_from_onnx(source, tmp_path / "out.mnn", FLOAT)
    assert not (tmp_path / "out.mnn").exists()


def test_the_second_pass_puts_weights_beside_and_changes_no_output(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ComponentRecipe(weights=WeightScheme(bits=8), floats="fp16", floor_db=1)
    mnn_from_onnx(source, folder / "one.mnn", recipe)
    monkeypatch.setattr(converter, "EXTERNAL_FROM", 0)
    storage = mnn_from_onnx(source, folder / "two.mnn", recipe)
    assert storage.weight_file_bytes == (folder / "two.mnn.weight").stat().st_size > 0
    assert not (folder / "one.mnn.weight").exists()
    one, two = (MnnSession(folder / name) for name in ("one.mnn", "two.mnn"))
    given = feeds(7)
    for name, output in one.run(given).items():
        np.testing.assert_array_equal(two.run(given)[name], output, strict=True)


def test_the_second_pass_refuses_a_model_with_its_weights_beside_it(source: Path, folder: Path) -> None:
    convert(source, folder / "stub.mnn", folder, "--saveExternalData")
    assert (folder / "stub.mnn.weight").stat().st_size > 0
    with pytest.raises(ConversionError, match="separate file"):
        _fp16_pass(folder / "stub.mnn", folder / "out.mnn", DEFAULT_CONVERTER, folder)
    assert not (folder / "out.mnn").exists()
