"""Running a `.mnn`: right at every length, strict about what goes in, quiet, and on no other backend than asked."""

import concurrent.futures
import os
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from sa3_convert.errors import BackendError, ModelFileError
from sa3_convert.mnn.compatibility import has_backend, runtime_backends
from sa3_convert.mnn.converter import mnn_from_onnx
from sa3_convert.mnn.session import MnnSession
from sa3_convert.recipe import ComponentRecipe, WeightScheme
from tests.mnn.converted import Converter
from tests.mnn.perceptron import WIDTH, decibels, feeds, reference, write_perceptron
from tests.passes.graphs import graph, mnn_of


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_perceptron(tmp_path_factory.mktemp("onnx") / "perceptron.onnx")


@pytest.fixture(scope="module")
def model(onnx_path: Path) -> Path:
    path = onnx_path.with_suffix(".mnn")
    mnn_from_onnx(onnx_path, path, ComponentRecipe(floor_db=100))
    return path


@pytest.fixture(scope="module")
def quantised(onnx_path: Path) -> Path:
    path = onnx_path.with_name("int8.mnn")
    mnn_from_onnx(onnx_path, path, ComponentRecipe(weights=WeightScheme(bits=8), floor_db=30))
    return path


def test_every_length_gives_what_onnx_runtime_gives(onnx_path: Path, model: Path) -> None:
    with MnnSession(model, inputs=["x", "ids"], outputs=["y", "z"], threads=1) as session:
        for length in (7, 1, 33, 33, 7):
            result, expected = session.run(feeds(length, seed=length)), reference(onnx_path, length, seed=length)
            for name in ("y", "z"):
                np.testing.assert_allclose(result[name], expected[name], rtol=0, atol=1e-5, strict=True)


def test_outputs_come_in_the_order_asked_for_and_only_those(model: Path) -> None:
    assert list(MnnSession(model, outputs=["z"], threads=1).run(feeds())) == ["z"]
    assert list(MnnSession(model, outputs=["z", "y"], threads=1).run(feeds())) == ["z", "y"]


def test_names_and_declared_shapes_are_read_from_the_file(model: Path) -> None:
    session = MnnSession(model, threads=1)
    assert {name: (str(port.dtype), port.shape) for name, port in session.inputs.items()} == {
        "x": ("float32", (1, -1, WIDTH)),
        "ids": ("int32", (1, 5)),
    }
    assert sorted(session.outputs) == ["y", "z"]


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="the modes of x86 on Linux")
@pytest.mark.parametrize("threads", [1, 2])
def test_weights_of_masked_keys_are_zero_in_all_threads(tmp_path: Path, threads: int) -> None:
    # MNN's smallest exponential is 1.6e-38; divided by two keys that are seen it is subnormal.
    softmax = graph("(float[1, 4096, 64] x) => (float[1, 4096, 64] y) { y = Softmax<axis = -1>(x) }")
    logits = np.full((1, 4096, 64), -1e4, np.float32)
    logits[..., :2] = 0
    weights = MnnSession(mnn_of(softmax, tmp_path), threads=threads).run({"x": logits})["y"]
    np.testing.assert_array_equal(weights[..., :2], 0.5)
    np.testing.assert_array_equal(weights[..., 2:], 0)
    tiny = np.array([1e-20], np.float32)
    assert (tiny * tiny)[0] > 0, "the caller's own arithmetic changed"


def test_results_belong_to_the_caller(model: Path) -> None:
    session = MnnSession(model, threads=1)
    first = session.run(feeds(seed=1))["y"]
    kept = first.copy()
    session.run(feeds(seed=2))
    session.close()
    assert first.flags.owndata
    np.testing.assert_array_equal(first, kept, strict=True)


def test_an_array_that_is_not_contiguous_is_read_in_its_own_order(onnx_path: Path, model: Path) -> None:
    inputs = feeds()
    inputs["x"] = np.asfortranarray(inputs["x"])
    result = MnnSession(model, threads=1).run(inputs)["y"]
    np.testing.assert_allclose(result, reference(onnx_path)["y"], rtol=0, atol=1e-5, strict=True)


@pytest.mark.parametrize("memory", ["normal", "high", "low"])
def test_quantised_weights_work_in_every_memory_mode(onnx_path: Path, quantised: Path, memory: str) -> None:
    session = MnnSession(quantised, threads=1, memory=memory)  # type: ignore[arg-type]
    assert decibels(reference(onnx_path)["y"], session.run(feeds())["y"]) > 30


def test_low_memory_is_really_asked_for(converter: Converter, tmp_path: Path) -> None:
    from tests.mnn.converted import gaussian, linear_graph

    model = converter(linear_graph(tmp_path / "linear.onnx", gaussian(512, 512)), "--weightQuantBits", "8")
    x = {"x": gaussian(512, 512, seed=1)}
    with MnnSession(model, threads=1) as normal, MnnSession(model, threads=1, memory="low") as low:
        unpacked, kept = normal.run(x)["y"], low.run(x)["y"]
        # 512² weights are 1 MiB as floats and a quarter of that as they are.
        assert normal.memory_mb - low.memory_mb > 0.7
    assert 30 < decibels(unpacked, kept) < 90


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"y": np.zeros(1, np.float32)}, "takes ids, x, not x, ids, y"),
        ({"x": None}, "takes ids, x, not ids"),
        ({"x": np.zeros((1, 7, WIDTH), np.float64)}, "x is float64"),
        ({"x": np.zeros((1, 7, WIDTH), np.float16)}, "x is float16"),
        ({"ids": np.zeros((1, 5), np.int64)}, "ids is int64"),
        ({"x": np.zeros((1, 7, WIDTH - 1), np.float32)}, r"x is \[1, 7, 63\]"),
        ({"x": np.zeros((7, WIDTH), np.float32)}, r"x is \[7, 64\]"),
        ({"x": np.zeros((1, 0, WIDTH), np.float32)}, r"x is \[1, 0, 64\]"),
        ({"ids": np.zeros((1, 6), np.int32)}, r"ids is \[1, 6\]"),
    ],
)
def test_feeds_that_the_model_does_not_declare_are_refused(
    model: Path, change: dict[str, np.ndarray | None], said: str
) -> None:
    wrong = {name: array for name, array in (feeds() | change).items() if array is not None}
    with pytest.raises(ValueError, match=said):
        MnnSession(model, threads=1).run(wrong)


def two_lengths(path: Path) -> Path:
    from onnx import TensorProto, helper

    from tests.mnn.converted import save_graph

    shapes = {"a": (TensorProto.FLOAT, [1, "T", 8]), "b": (TensorProto.FLOAT, [1, "T", 8])}
    return save_graph(path, [helper.make_node("Mul", ["a", "b"], ["y"])], shapes, ["y"], {})


def test_lengths_that_contradict_each_other_fail_with_what_mnn_said_and_the_next_run_is_right(
    converter: Converter, tmp_path: Path
) -> None:
    session = MnnSession(converter(two_lengths(tmp_path / "two.onnx")), threads=1)
    a, b = np.full((1, 6, 8), 3, np.float32), np.full((1, 6, 8), 5, np.float32)
    with pytest.raises(ModelFileError, match=r"a \[1, 6, 8\], b \[1, 4, 8\].*MNN said"):
        session.run({"a": a, "b": b[:, :4]})
    assert (session.run({"a": a, "b": b})["y"] == 15).all()


def test_non_finite_values_are_returned_for_the_caller_to_judge(converter: Converter, tmp_path: Path) -> None:
    session = MnnSession(converter(two_lengths(tmp_path / "two.onnx")), threads=1)
    a = np.array([[[np.nan, np.inf, -np.inf, 1, 2, 3, 4, 5]]], np.float32)
    np.testing.assert_array_equal(session.run({"a": a, "b": np.ones_like(a)})["y"], a, strict=True)


def test_a_failed_run_does_not_make_the_next_one_return_its_leftovers(converter: Converter, tmp_path: Path) -> None:
    session = MnnSession(converter(two_lengths(tmp_path / "two.onnx")), threads=1)
    ones = np.ones((1, 6, 8), np.float32)
    session.run({"a": ones, "b": ones})
    for _ in range(2):
        with pytest.raises(ModelFileError):
            session.run({"a": ones, "b": ones[:, :4]})


@pytest.mark.parametrize("names", [["x"], ["x", "ids", "more"], ["x", "idz"]])
def test_other_inputs_than_the_file_has_are_refused(model: Path, names: list[str]) -> None:
    with pytest.raises(ModelFileError, match="has the inputs ids, x; expected"):
        MnnSession(model, inputs=names)


def test_an_output_that_the_file_does_not_have_is_refused_with_those_that_it_has(model: Path) -> None:
    with pytest.raises(ModelFileError, match="no output 'out'; it has y, z"):
        MnnSession(model, outputs=["out"])


def test_an_intermediate_tensor_can_be_an_output(onnx_path: Path, model: Path) -> None:
    result = MnnSession(model, outputs=["sine", "y"], threads=1).run(feeds())
    assert result["sine"].shape == (1, 7, 2 * WIDTH)
    np.testing.assert_allclose(result["y"], reference(onnx_path)["y"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [0, -1])
def test_a_number_of_threads_below_one_is_refused(model: Path, threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        MnnSession(model, threads=threads)


@pytest.mark.parametrize("damage", ["absent", "folder", "empty", "random", "truncated", "onnx"])
def test_what_is_not_a_whole_model_is_refused(onnx_path: Path, model: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "damaged.mnn"
    content = {
        "empty": b"",
        "random": np.random.default_rng(0).bytes(10_000),
        "truncated": model.read_bytes()[:50_000],
        "onnx": onnx_path.read_bytes(),
    }
    if damage == "folder":
        path.mkdir()
    elif damage != "absent":
        path.write_bytes(content[damage])
    with pytest.raises(ModelFileError, match=r"damaged\.mnn"):
        MnnSession(path)


@pytest.mark.parametrize("kept", [None, 0, 100, -4])
def test_weights_beside_the_file_that_are_missing_or_short_are_refused(
    converter: Converter, onnx_path: Path, tmp_path: Path, kept: int | None
) -> None:
    made = converter(onnx_path, "--saveExternalData")
    stub, weights = tmp_path / "model.mnn", tmp_path / "model.mnn.weight"
    stub.write_bytes(made.read_bytes())
    if kept is not None:
        weights.write_bytes(made.with_name(f"{made.name}.weight").read_bytes()[:kept])
    with pytest.raises(ModelFileError, match=r"model\.mnn\.weight"):
        MnnSession(stub)


def test_weights_beside_the_file_are_found_wherever_the_two_are(
    converter: Converter, onnx_path: Path, tmp_path: Path
) -> None:
    made = converter(onnx_path, "--saveExternalData")
    (tmp_path / "model.mnn").write_bytes(made.read_bytes())
    (tmp_path / "model.mnn.weight").write_bytes(made.with_name(f"{made.name}.weight").read_bytes())
    result = MnnSession(tmp_path / "model.mnn", threads=1).run(feeds())["y"]
    np.testing.assert_allclose(result, reference(onnx_path)["y"], rtol=0, atol=1e-5)


def test_the_cpu_is_there_and_reported() -> None:
    found = runtime_backends()
    assert list(found) == ["cpu", "cuda", "opencl", "vulkan"]
    assert found["cpu"]


def test_what_runs_is_what_was_asked_for(model: Path) -> None:
    session = MnnSession(model, threads=1)
    assert session.backend_in_use == "cpu"
    assert session.memory_mb > 0


@pytest.mark.parametrize("backend", ["cuda", "opencl", "vulkan"])
def test_a_backend_that_is_not_there_is_an_error_and_not_the_cpu(model: Path, backend: str) -> None:
    """The runtime's own answer decides which of the two is right, so the test holds on a machine with a GPU too."""
    if has_backend(backend):  # type: ignore[arg-type]
        assert MnnSession(model, backend=backend).backend_in_use == backend  # type: ignore[arg-type]
        return
    with pytest.raises(BackendError, match=f"MNN_{backend.upper()}=ON") as caught:
        MnnSession(model, backend=backend)  # type: ignore[arg-type]
    assert caught.value.exit_code == 7


def test_mnn_that_silently_chose_another_backend_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3_convert.mnn.session.require_backend", lambda backend: None)
    with pytest.raises(BackendError, match="was to run on vulkan, but MNN would run it on cpu"):
        MnnSession(model, backend="vulkan")


def test_nothing_that_mnn_prints_reaches_standard_output(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.mnn").write_bytes(b"no model" * 100)
    runtime_backends()
    with pytest.raises(ModelFileError):
        MnnSession(tmp_path / "bad.mnn")
    with pytest.raises(ModelFileError):
        MnnSession(model, outputs=["out"])
    MnnSession(model, threads=1).run(feeds())
    sys.stdout.flush()
    os.write(1, b"ours\n")
    assert capfd.readouterr().out == "ours\n"


def test_a_closed_session_says_so(model: Path) -> None:
    session = MnnSession(model, threads=1)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run(feeds())


def test_sessions_in_several_threads_do_not_disturb_each_other(onnx_path: Path, model: Path) -> None:
    lengths = [3, 9, 20, 5] * 4
    expected = {length: reference(onnx_path, length, seed=length)["y"] for length in set(lengths)}
    shared = MnnSession(model, threads=1)

    def run(position: int) -> bool:
        session = shared if position % 2 else MnnSession(model, threads=1)
        length = lengths[position]
        return bool(np.allclose(session.run(feeds(length, seed=length))["y"], expected[length], atol=1e-5))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(len(lengths))))


def test_importing_the_module_brings_in_neither_mnn_nor_onnx() -> None:
    import subprocess

    code = (
        "import sys, sa3_convert.mnn.session, sa3_convert.mnn.converter;"
        "print([m for m in ('MNN', '_tools', 'onnx', 'torch', 'onnxruntime') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
