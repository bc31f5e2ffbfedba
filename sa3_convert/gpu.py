"""NVIDIA GPUs and their memory, as the driver tells (NVML); nothing where there is no driver or no `nvidia-ml-py`."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device."""

    index: int
    name: str
    driver: str
    memory_bytes: int


def gpus() -> tuple[Gpu, ...]:
    """Return the devices of this machine."""
    with _nvml() as nvml:
        if nvml is None:
            return ()
        handles = [(i, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())]
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        return tuple(
            Gpu(i, _text(nvml.nvmlDeviceGetName(handle)), driver, int(nvml.nvmlDeviceGetMemoryInfo(handle).total))
            for i, handle in handles
        )


class PeakMemory:
    """Watches the device memory that this process holds while a `with` block runs, by asking now and then."""

    def __init__(self, every: float = 0.05) -> None:
        self._every = every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes: int | None = None
        """The most that was seen; None where nobody can say."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        with _nvml() as nvml:
            while nvml is not None:
                found = _own_memory(nvml)
                if found is not None:
                    self.bytes = max(found, self.bytes or 0)
                if self._done.wait(self._every):
                    return


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Yield NVML, initialised, or None."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _own_memory(nvml: Any) -> int | None:
    """Return the device memory that this process holds now, over all devices."""
    held = [
        int(process.usedGpuMemory)
        for index in range(nvml.nvmlDeviceGetCount())
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index))
        # In a container the driver may know the process by another number, or not say how much it holds.
        if process.pid == os.getpid() and process.usedGpuMemory is not None
    ]
    return sum(held) if held else None
