"""What the driver is asked, with a driver of our own."""

import os
import sys
import time
from types import SimpleNamespace

import pytest

from sa3_convert.system.machine import Gpu, PeakMemory, gpu_state, gpus


class FakeDriver:
    """Two devices; this process holds more on the second each time that it is asked."""

    NVMLError = RuntimeError

    def __init__(self) -> None:
        self.running = 0
        self.held: int | None = 100

    def nvmlInit(self) -> None:  # noqa: N802
        self.running += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.running -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "600.1"

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return f"GPU {handle}".encode()

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=1 << 30, free=1 << 28)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:  # noqa: N802
        other = SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=10**9)
        return [other, SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.held)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    return fake


def test_devices_are_listed(driver: FakeDriver) -> None:
    assert gpus() == (Gpu(0, "GPU 0", "600.1", 1 << 30), Gpu(1, "GPU 1", "600.1", 1 << 30))
    assert driver.running == 0


def test_the_most_that_this_process_held_on_all_devices_is_kept(driver: FakeDriver) -> None:
    with PeakMemory(every=0.001) as peak:
        time.sleep(0.05)
        driver.held = 300
        time.sleep(0.05)
        driver.held = 50
    assert peak.bytes == 600
    assert driver.running == 0


def test_what_the_driver_does_not_tell_is_unknown(driver: FakeDriver) -> None:
    driver.held = None
    with PeakMemory() as peak:
        pass
    assert peak.bytes is None


def test_without_a_driver_there_is_nothing(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(driver, "nvmlInit", fail)
    with PeakMemory() as peak:
        assert gpus() == ()
    assert peak.bytes is None


def test_without_the_package_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    with PeakMemory() as peak:
        assert gpus() == ()
    assert peak.bytes is None


def test_devices_are_told_in_words(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_state() == "driver 600.1; GPU 0 has 256 of 1024 MiB free; GPU 1 has 256 of 1024 MiB free"
    assert driver.running == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    assert "nvidia-ml-py" in gpu_state()
