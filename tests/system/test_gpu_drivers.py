"""What drivers are asked, with drivers of our own; the sentences say what is missing, with numbers."""

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sa3_convert.errors import BackendError
from sa3_convert.system import gpu_drivers
from sa3_convert.system.gpu_drivers import cuda_code, cuda_device, cuda_fault, free_cuda_memory, require_device


class FakeCuda:
    """NVIDIA's driver with one device; `codes` are what functions return instead of success."""

    def __init__(self, devices: int = 1, capability: tuple[int, int] = (8, 6), version: int = 12040) -> None:
        self.devices, self.capability, self.version = devices, capability, version
        self.free = 3 << 30
        self.codes: dict[str, int] = {}
        self.contexts = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: self.codes.get(name) or self._answer(name, [*arguments])

    def _answer(self, name: str, arguments: list[Any]) -> int:
        out = getattr(arguments[0], "_obj", None) if arguments else None
        match name:
            case "cuDriverGetVersion":
                out.value = self.version
            case "cuDeviceGetCount":
                out.value = self.devices
            case "cuDeviceGetName":
                arguments[0].value = b"Fake 3000"
            case "cuDeviceTotalMem_v2":
                out.value = 8 << 30
            case "cuDeviceGetAttribute":
                out.value = self.capability[arguments[1].value - 75]
            case "cuMemGetInfo_v2":
                out.value = self.free
            case "cuDevicePrimaryCtxRetain":
                self.contexts += 1
            case "cuDevicePrimaryCtxRelease_v2":
                self.contexts -= 1
            case "cuGetErrorString":
                arguments[1]._obj.value = b"an illegal memory access was encountered"
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    monkeypatch.setattr(gpu_drivers, "_loaded_files", list)
    return fake


def fat_binary(*entries: tuple[int, int]) -> bytes:
    """Return a fat binary of (kind, architecture) entries, laid out as those of NVIDIA's libraries."""
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, 24, 0, 0, 0, 0, architecture).ljust(64 + 24, b"\0")
        for kind, architecture in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_a_device_is_described_by_its_driver(cuda: FakeCuda) -> None:
    require_device("cuda", "mnn")
    assert str(cuda_device()) == "Fake 3000 (compute capability 8.6, 8.0 GiB, driver for CUDA 12.4)"


@pytest.mark.parametrize("backend", ["cuda", "opencl", "vulkan"])
def test_no_driver_is_said_with_what_the_loader_says(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(BackendError, match=r"not installed here: .*cannot open shared object file"):
        require_device(backend, "mnn")
    assert free_cuda_memory() is None
    assert cuda_fault() is None


def test_no_device_is_said(cuda: FakeCuda) -> None:
    cuda.devices = 0
    with pytest.raises(BackendError, match="finds no device"):
        require_device("cuda", "mnn")
    cuda.codes["cuInit"] = 100
    with pytest.raises(BackendError, match="finds no device"):
        require_device("cuda", "mnn")


def test_a_driver_that_fails_is_quoted_with_its_number(cuda: FakeCuda) -> None:
    cuda.codes["cuInit"] = 803
    with pytest.raises(BackendError, match=r"fails at cuInit: an illegal memory access was encountered \(803\)"):
        require_device("cuda", "mnn")


@pytest.mark.parametrize("library", ["libcudart.so.13", "cudart64_13.dll"])
def test_a_driver_older_than_the_runtime_is_refused_with_both_versions(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setattr(gpu_drivers, "_loaded_files", lambda: [Path(library)])
    with pytest.raises(BackendError, match=r"driver for CUDA 12\.4\) is too old for CUDA 13"):
        require_device("cuda", "mnn")
    cuda.version = 13000
    require_device("cuda", "mnn")


@pytest.mark.parametrize(
    ("capability", "entries", "runs"),
    [
        ((8, 6), [(2, 80)], True),
        ((8, 6), [(2, 86), (2, 120)], True),
        ((9, 0), [(2, 60), (2, 89), (2, 120)], False),
        ((9, 0), [(2, 80), (1, 80)], True),
        ((7, 5), [(2, 80), (1, 80)], False),
        ((8, 0), [(2, 86)], False),
        ((9, 0), [], True),
    ],
)
def test_a_device_for_which_nothing_was_built_is_refused(
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: tuple[int, int],
    entries: list[tuple[int, int]],
    runs: bool,
) -> None:
    library = tmp_path / "libMNN_Cuda_Main.so"
    library.write_bytes(b"\x7fELF" + bytes(100) + b"".join(fat_binary(entry) for entry in entries) + bytes(50))
    monkeypatch.setattr(gpu_drivers, "_loaded_files", lambda: [library, tmp_path / "libtorch_cuda.so"])
    cuda.capability = capability
    if runs:
        return require_device("cuda", "mnn")
    with pytest.raises(
        BackendError, match=f"built for compute capability .*capability {'.'.join(map(str, capability))}"
    ):
        require_device("cuda", "mnn")
    return None


def test_device_code_is_found_wherever_it_stands_and_damage_is_no_error(tmp_path: Path) -> None:
    whole, cut = tmp_path / "a", tmp_path / "b"
    whole.write_bytes(fat_binary((2, 80), (1, 89)) + bytes(33) + fat_binary((2, 120)))
    cut.write_bytes(whole.read_bytes()[:70])
    (tmp_path / "empty").touch()
    assert cuda_code([whole]) == {(False, (8, 0)), (True, (8, 9)), (False, (12, 0))}
    assert cuda_code([cut, tmp_path / "empty", tmp_path / "absent"]) == frozenset()


def test_free_memory_is_asked_in_the_context_that_others_use_and_given_back(cuda: FakeCuda) -> None:
    assert free_cuda_memory() == 3 << 30
    cuda.codes["cuMemGetInfo_v2"] = 700
    assert free_cuda_memory() is None
    assert cuda.contexts == 0


@pytest.mark.parametrize(
    ("code", "fault"), [(0, None), (201, None), (700, "an illegal memory access was encountered (700)")]
)
def test_a_fault_of_the_device_is_told(cuda: FakeCuda, code: int, fault: str | None) -> None:
    cuda.codes["cuCtxSynchronize"] = code
    assert cuda_fault() == fault


class FakeOpenCl:
    def __init__(self, *gpus: int) -> None:
        self.gpus = gpus

    def clGetPlatformIDs(self, room: Any, platforms: Any, count: Any) -> int:  # noqa: N802
        if platforms is None:
            count._obj.value = len(self.gpus)
        else:
            platforms[:] = range(1, len(self.gpus) + 1)
        return 0

    def clGetDeviceIDs(self, platform: Any, kind: Any, room: Any, devices: Any, count: Any) -> int:  # noqa: N802
        assert kind.value == 4
        count._obj.value = self.gpus[platform.value - 1]
        return 0 if count._obj.value else -1


def test_opencl_needs_a_gpu_on_some_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeOpenCl(0, 2))
    require_device("opencl", "mnn")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeOpenCl(0))
    with pytest.raises(BackendError, match=r"no GPU \(1 platforms\)"):
        require_device("opencl", "mnn")


class FakeVulkan:
    def __init__(self, code: int, devices: int) -> None:
        self.code, self.devices = code, devices

    def vkCreateInstance(self, info: Any, allocator: Any, instance: Any) -> int:  # noqa: N802
        assert info._obj.type == 1
        return self.code

    def vkEnumeratePhysicalDevices(self, instance: Any, count: Any, devices: Any) -> int:  # noqa: N802
        count._obj.value = self.devices
        return 0

    def vkDestroyInstance(self, instance: Any, allocator: Any) -> None:  # noqa: N802
        pass


def test_vulkan_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeVulkan(0, 1))
    require_device("vulkan", "mnn")
    for driver, said in ((FakeVulkan(0, 0), "finds no device"), (FakeVulkan(-9, 0), "fails with -9")):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, driver=driver: driver)
        with pytest.raises(BackendError, match=said):
            require_device("vulkan", "mnn")
