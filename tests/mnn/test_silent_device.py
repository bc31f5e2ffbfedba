"""A device that reports nothing: what it did not write is found, and is exit 7 with what to try."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_convert.errors import BackendError, ModelFileError
from sa3_convert.mnn.session import MnnSession
from tests.mnn.converted import Converter, gaussian, linear_graph
from tests.passes.graphs import graph, mnn_of


class Tampered:
    """An object of MNN's whose methods are some of them others."""

    def __init__(self, inner: Any, **methods: Callable[..., Any]) -> None:
        self._inner, self._methods = inner, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods.get(name) or getattr(self._inner, name)


@pytest.fixture
def model(converter: Converter, tmp_path: Path) -> Path:
    return converter(linear_graph(tmp_path / "linear.onnx", gaussian(8, 4)))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processor be taken for a GPU."""
    monkeypatch.setattr("sa3_convert.mnn.session.require_backend", lambda backend: None)
    monkeypatch.setattr(MnnSession, "backend_in_use", "opencl")


@pytest.fixture
def session(model: Path, gpu: None) -> MnnSession:
    return MnnSession(model, threads=1, backend="opencl")


X = {"x": gaussian(8, 8, seed=1)}


def copying(session: MnnSession, copy: Callable[[Any, Any], None]) -> None:
    """Make outputs come to the host by `copy`, which reports success."""
    interpreter = session._interpreter

    def output(*arguments: Any) -> Tampered:
        tensor = interpreter.getSessionOutput(*arguments)
        return Tampered(tensor, copyToHostTensor=lambda host: copy(tensor, host) or True)

    session._interpreter = Tampered(interpreter, getSessionOutput=output)


def test_outputs_that_were_filled_before_come_out_right(session: MnnSession) -> None:
    for _ in range(2):
        np.testing.assert_allclose(session.run(X)["y"], X["x"] @ gaussian(8, 4), atol=1e-5)


def test_a_copy_that_writes_nothing_is_told_with_what_to_try(session: MnnSession) -> None:
    copying(session, lambda tensor, host: None)
    with pytest.raises(BackendError, match=r"32 of 32 numbers of y .* reported nothing and wrote nothing") as caught:
        session.run(X)
    assert caught.value.exit_code == 7
    assert "doctor --backend opencl" in str(caught.value)
    assert "--device cpu" in str(caught.value)


def test_a_copy_that_writes_a_part_is_told(session: MnnSession) -> None:
    def half(tensor: Any, host: Any) -> None:
        view = host.getNumpyData()
        before = view.copy()
        tensor.copyToHostTensor(host)
        view.reshape(-1)[5:] = before.reshape(-1)[5:]

    copying(session, half)
    with pytest.raises(BackendError, match=r"27 of 32 numbers of y .* wrote a part"):
        session.run(X)


def test_a_run_that_computes_nothing_is_told_although_the_copy_works(session: MnnSession) -> None:
    session._interpreter = Tampered(session._interpreter, runSession=lambda _: 0)
    with pytest.raises(BackendError, match="wrote nothing"):
        session.run(X)


def test_a_second_run_that_computes_nothing_does_not_return_the_first_ones_numbers(session: MnnSession) -> None:
    session.run(X)
    session._interpreter = Tampered(session._interpreter, runSession=lambda _: 0)
    with pytest.raises(BackendError, match="wrote nothing"):
        session.run(X)


@pytest.mark.usefixtures("gpu")
def test_nan_that_a_model_computes_is_returned(tmp_path: Path) -> None:
    model = mnn_of(graph("(float[4] x) => (float[4] y) { y = Add(x, x) }"), tmp_path)
    x = np.array([1, np.nan, np.inf, 2], np.float32)
    np.testing.assert_array_equal(MnnSession(model, threads=1, backend="opencl").run({"x": x})["y"], 2 * x)


def test_an_error_code_of_a_device_is_exit_7(session: MnnSession) -> None:
    session._interpreter = Tampered(session._interpreter, runSession=lambda _: 1)
    with pytest.raises(BackendError, match="error code 1"):
        session.run(X)


def test_an_error_code_on_the_cpu_is_the_files(model: Path) -> None:
    session = MnnSession(model, threads=1)
    session._interpreter = Tampered(session._interpreter, runSession=lambda _: 1)
    with pytest.raises(ModelFileError, match="error code 1"):
        session.run(X)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3_convert.mnn.session.require_backend", lambda backend: None)
    monkeypatch.setattr(MnnSession, "backend_in_use", "cuda")


@pytest.mark.usefixtures("cuda")
def test_a_fault_that_the_driver_tells_is_quoted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = MnnSession(model, threads=1, backend="cuda")
    monkeypatch.setattr("sa3_convert.system.gpu_drivers.cuda_fault", lambda: "an illegal memory access (700)")
    with pytest.raises(BackendError, match=r"fault of the device: an illegal memory access \(700\)"):
        session.run(X)


@pytest.mark.usefixtures("cuda")
def test_too_little_memory_is_refused_before_loading_with_both_figures(
    converter: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = converter(linear_graph(tmp_path / "big.onnx", gaussian(1024, 1024)), "--weightQuantBits", "8")
    monkeypatch.setattr("sa3_convert.system.gpu_drivers.free_cuda_memory", lambda: 3 << 19)
    with pytest.raises(BackendError, match=r"does not fit.*take 2 MiB of the device's memory, and 2 MiB are free"):
        MnnSession(big, threads=1, backend="cuda")
    # 8-bit weights that stay so take half of that.
    MnnSession(big, threads=1, backend="cuda", memory="low")
