"""Backends: there only if MNN has them and the driver a device; MNN's bindings, whose references are miscounted."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from sa3_convert.errors import BackendError
from sa3_convert.mnn import compatibility
from sa3_convert.mnn.compatibility import has_backend, mnn_version, require_backend


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put an MNN there that makes a runtime of every kind, as one built with CUDA does without a device."""
    interpreter = SimpleNamespace(createRuntime=lambda configs: (None, (True,)))
    built = SimpleNamespace(Interpreter=interpreter, version=lambda: "9.8.7")
    monkeypatch.setattr(compatibility, "load_mnn", lambda: built)
    compatibility._missing.cache_clear()
    yield
    compatibility._missing.cache_clear()


def test_asking_for_a_backend_again_costs_no_reference_to_true() -> None:
    assert has_backend("cpu")
    before = sys.getrefcount(True)
    for _ in range(50):
        has_backend("cpu")
    assert sys.getrefcount(True) > before - 25


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("backend", ["cuda", "opencl", "vulkan"])
def test_a_runtime_without_a_device_is_not_there(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    def nothing(asked: str, library: str) -> None:
        raise BackendError(f"{asked} has no device.")

    monkeypatch.setattr("sa3_convert.system.gpu_drivers.require_device", nothing)
    assert not has_backend(backend)  # type: ignore[arg-type]
    with pytest.raises(
        BackendError, match=f"MNN 9.8.7 has a {backend.upper()} backend.*{backend} has no device"
    ) as caught:
        require_backend(backend)  # type: ignore[arg-type]
    assert caught.value.exit_code == 7


@pytest.mark.usefixtures("cuda_build")
def test_a_runtime_with_a_device_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3_convert.system.gpu_drivers.require_device", lambda backend, library: None)
    assert has_backend("cuda")


@pytest.mark.usefixtures("cuda_build")
def test_the_version_is_what_the_module_says_whatever_the_package_is_called() -> None:
    assert mnn_version() == "9.8.7"


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(BackendError, match=r"libcudart\.so\.13"):
        compatibility.load_mnn.__wrapped__()
