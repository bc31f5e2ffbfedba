"""NVIDIA GPUs and their memory, as the driver tells (NVML); nothing where there is no driver or no `nvidia-ml-py`."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


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


def own_memory_bytes() -> int | None:
    """Return the device memory that this process holds now, over all devices; None where nobody can say."""
    with _nvml() as nvml:
        if nvml is None:
            return None
        total, known = 0, False
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                # In a container the driver may know the process by another number, or not say how much it holds.
                if process.pid == os.getpid() and process.usedGpuMemory is not None:
                    total += int(process.usedGpuMemory)
                    known = True
        return total if known else None


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
