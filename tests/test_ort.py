"""The reference runtime: what it accepts, what it refuses, and that it computes what the graph says."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_failures

from sa3_convert import ort as runtime
from sa3_convert.arrays import Placed, constant
from sa3_convert.errors import BackendError, ModelFileError
from sa3_convert.ort import OrtSession, cuda_problem, integer_products_saturate

WEIGHT = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)


def write_model(path: Path) -> Path:
    """`y` = `x` [1,T,64] · W + `bias` [1,T,32]; the weight is external data."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", 64]),
            helper.make_tensor_value_info("bias", TensorProto.FLOAT, [1, "T", 32]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "T", 32]),
            helper.make_tensor_value_info("product", TensorProto.FLOAT, [1, "T", 32]),
        ],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.onnx")


def feeds(length: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(length)
    return {
        "x": random.standard_normal((1, length, 64)).astype(np.float32),
        "bias": random.standard_normal((1, length, 32)).astype(np.float32),
    }


def test_a_model_computes_what_its_graph_says(model: Path) -> None:
    inputs = feeds()
    out = OrtSession(model, threads=1).run(inputs)
    np.testing.assert_allclose(out["product"], inputs["x"] @ WEIGHT, rtol=0, atol=1e-4, strict=True)
    np.testing.assert_allclose(out["y"], inputs["x"] @ WEIGHT + inputs["bias"], rtol=0, atol=1e-4, strict=True)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_one_session_runs_every_length(lengths: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    session = OrtSession(write_model(tmp_path_factory.mktemp("m") / "m.onnx"), threads=1)
    for length in lengths:
        assert session.run(feeds(length))["y"].shape == (1, length, 32)


def test_results_are_owned_by_the_caller(model: Path) -> None:
    session = OrtSession(model, threads=1)
    first = session.run(feeds())["y"]
    kept = first.copy()
    session.run(feeds(7))
    del session
    np.testing.assert_array_equal(first, kept)
    first[:] = 0  # writable


def test_only_the_outputs_that_were_asked_for_come_back(model: Path) -> None:
    session = OrtSession(model, threads=1, outputs=["product"])
    assert session.outputs == ("product",)
    assert set(session.run(feeds())) == {"product"}


def test_an_output_that_the_model_lacks_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match=r"has no output z; it has y, product"):
        OrtSession(model, outputs=["y", "z"])


def test_no_more_threads_than_this_process_may_use_and_none_that_spin(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sa3_convert.ort.default_threads", lambda: 3)
    for threads, expected in ((None, 3), (2, 2)):
        chosen = OrtSession(model, threads=threads)._session.get_session_options()
        assert (chosen.intra_op_num_threads, chosen.inter_op_num_threads) == (expected, 1)
        assert chosen.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_inputs_are_named_in_the_models_order(model: Path) -> None:
    assert OrtSession(model).inputs == ("x", "bias")


def test_an_array_that_is_not_contiguous_gives_the_same_result(model: Path) -> None:
    session = OrtSession(model, threads=1)
    inputs = feeds()
    strided = {name: np.asfortranarray(array) for name, array in inputs.items()}
    np.testing.assert_array_equal(session.run(strided)["y"], session.run(inputs)["y"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "takes x, bias, not bias"),
        ({"extra": np.zeros(1, np.float32)}, "takes x, bias, not x, bias, extra"),
        ({"x": np.zeros((1, 5, 64))}, "x is float64, .* takes float32"),
        ({"x": np.zeros((1, 5, 63), np.float32)}, r"x is \[1, 5, 63\]"),
        ({"x": np.zeros((5, 64), np.float32)}, r"x is \[5, 64\]"),
        ({"bias": np.zeros((1, 6, 32), np.float32)}, r"bias is \[1, 6, 32\], .*T = 5"),
    ],
)
def test_feeds_that_do_not_fit_are_refused_by_name(
    model: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    inputs = {name: array for name, array in {**feeds(), **change}.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        OrtSession(model).run(inputs)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        OrtSession(tmp_path / "absent.onnx")


def test_missing_external_data_is_an_input_error(model: Path) -> None:
    (model.parent / "m.onnx.data").unlink()
    with pytest.raises(ModelFileError, match=r"\.data"):
        OrtSession(model)


@pytest.mark.parametrize("keep", [0, 1, 4096, 8191])
def test_truncated_external_data_is_an_input_error(model: Path, keep: int) -> None:
    data = model.parent / "m.onnx.data"
    assert data.stat().st_size == WEIGHT.nbytes
    data.write_bytes(data.read_bytes()[:keep])
    with pytest.raises(ModelFileError, match=r"m\.onnx"):
        OrtSession(model)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_not_onnx_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"m\.onnx"):
        OrtSession(tmp_path / "m.onnx")


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.95])
def test_a_truncated_model_is_an_input_error(model: Path, keep: float) -> None:
    whole = model.read_bytes()
    model.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ModelFileError, match=r"m\.onnx"):
        OrtSession(model)


def test_an_operator_that_does_not_exist_is_an_input_error(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Frobnicate", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="Frobnicate"):
        OrtSession(tmp_path / "m.onnx")


def test_a_text_input_is_an_input_error(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=r"x \(tensor\(string\)\)"):
        OrtSession(tmp_path / "m.onnx")


def test_a_length_that_the_graph_cannot_take_is_an_input_error_that_names_the_shapes(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "pairs"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["half", 2])],
        [numpy_helper.from_array(np.array([-1, 2]), "pairs")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    session = OrtSession(tmp_path / "m.onnx")
    assert session.run({"x": np.zeros(4, np.float32)})["y"].shape == (2, 2)
    with pytest.raises(ModelFileError, match=r"x \[5\]"):
        session.run({"x": np.zeros(5, np.float32)})


def test_failures_print_nothing(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (model.parent / "m.onnx.data").unlink()
    with pytest.raises(ModelFileError):
        OrtSession(model)
    assert capfd.readouterr() == ("", "")


def test_what_cannot_change_is_sent_once_and_what_can_every_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, sent = OrtSession(model, threads=1), []
    place = session._placed.place
    monkeypatch.setattr(session, "_placed", Placed(lambda array: sent.append(array.shape) or place(array)))
    x, bias = feeds()["x"], feeds()["bias"]
    fixed = constant(bias)
    for _ in range(3):
        out = session.run({"x": x, "bias": fixed})["y"]
    assert (sent.count(x.shape), sent.count(bias.shape)) == (3, 1)
    np.testing.assert_allclose(out, x @ WEIGHT + bias, rtol=0, atol=1e-4)
    bias += 1
    again = session.run({"x": x, "bias": bias})["y"]
    np.testing.assert_allclose(again, out + 1, rtol=0, atol=1e-4)


class FakeCuda:
    """What a build of ONNX Runtime with CUDA says, on a machine where it does not start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.preloaded = 0
        self.failure = failure
        monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        monkeypatch.setattr(ort, "preload_dlls", self.preload)
        monkeypatch.setattr(ort, "InferenceSession", self.open)
        monkeypatch.setattr("sa3_convert.ort.cuda_device", lambda: None)

    def preload(self) -> None:
        self.preloaded += 1
        sys.stdout.write("Failed to load libcudnn.so.9\n")

    def open(self, path: str, options: Any, providers: list[Any]) -> Any:
        assert self.preloaded
        self.asked = providers
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])


def test_cuda_is_asked_for_exactly_and_its_libraries_are_loaded_first(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cuda = FakeCuda(monkeypatch)
    with pytest.raises(BackendError, match=r"did not start .* cuDNN|cuDNN 9, and did not start"):
        OrtSession(model, device="cuda")
    (name, options), fallback = cuda.asked
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["use_tf32"] == "0"
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert "Failed" not in "".join(capfd.readouterr())


def test_without_a_driver_it_is_what_is_told_and_onnx_runtime_is_not_asked(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise BackendError("NVIDIA's driver is not installed here: libcuda.so.1.")

    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr("sa3_convert.ort.cuda_device", absent)
    with pytest.raises(BackendError, match=r"driver is not installed here.*not with pip.*Or use --device cpu"):
        OrtSession(model, device="cuda")
    assert not cuda.preloaded
    assert not cuda.asked


def test_a_device_without_memory_is_exit_7_with_numbers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 104857600"
    FakeCuda(monkeypatch, ort_failures.RuntimeException(text))
    monkeypatch.setattr("sa3_convert.ort.gpu_state", lambda: "driver 600, GPU 0 has 12 of 8192 MiB free")
    with pytest.raises(BackendError, match=r"m\.onnx needs 100 MiB at once; driver 600, GPU 0 has 12 of 8192 MiB free"):
        OrtSession(model, device="cuda")


def test_the_cpu_package_over_the_gpu_package_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr("sa3_convert.ort.version_of", versions.get)
    problem = cuda_problem()
    assert problem is not None
    assert "onnxruntime 1.32.0, for the CPU, lies over onnxruntime-gpu 1.31.1" in problem
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in problem
    versions["onnxruntime-gpu"] = "absent"
    assert "built for the CPU" in str(cuda_problem())


def test_the_product_that_is_tried_is_one_of_bytes() -> None:
    ports = [("a", TensorProto.UINT8, [2, 8]), ("b", TensorProto.INT8, [8, 16]), ("y", TensorProto.INT32, [2, 16])]
    *inputs, output = (helper.make_tensor_value_info(*port) for port in ports)
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "g", inputs, [output])
    expected = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=8)
    assert expected.SerializeToString() == runtime._BYTES_PRODUCT


@pytest.mark.parametrize(("saturated", "told"), [(0, False), (1000, True)])
def test_products_that_saturate_are_found_and_exact_ones_asked_for(
    model: Path, monkeypatch: pytest.MonkeyPatch, saturated: int, told: bool
) -> None:
    entries: list[tuple[str, str]] = []

    class Options(ort.SessionOptions):  # type: ignore[misc]
        def add_session_config_entry(self, key: str, value: str) -> None:
            entries.append((key, value))
            super().add_session_config_entry(key, value)

    class Kernels:
        """What a processor without VNNI gives."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def run(self, _: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [given["a"].astype(np.int32) @ given["b"] - saturated]

    integer_products_saturate.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(runtime.ort, "InferenceSession", Kernels)
        assert integer_products_saturate() is told
    monkeypatch.setattr(runtime.ort, "SessionOptions", Options)
    try:
        for optimise in (False, True):
            entries.clear()
            OrtSession(model, threads=1, optimise=optimise)
            assert (("session.x64quantprecision", "1") in entries) is (told and optimise)
    finally:
        integer_products_saturate.cache_clear()
