"""What the drivers of GPUs say of themselves, asked through their own libraries: a runtime's word is not enough.

Every answer that is no device is a BackendError with the reason, because each of them ends in one.
"""

import ctypes
import mmap
import os
import re
import struct
from collections.abc import Iterable
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sa3_convert.errors import BackendError

_CUDA: Final = ("nvcuda.dll",) if os.name == "nt" else ("libcuda.so.1", "libcuda.so")
_OPENCL: Final = ("OpenCL.dll",) if os.name == "nt" else ("libOpenCL.so.1", "libOpenCL.so")
_VULKAN: Final = ("vulkan-1.dll",) if os.name == "nt" else ("libvulkan.so.1", "libvulkan.so")

# From cuda.h, CL/cl.h and vulkan_core.h.
_NO_CONTEXT, _NO_DEVICE = 201, 100
_CAPABILITY: Final = (75, 76)
_CL_GPU: Final = 4
_VK_INSTANCE_INFO: Final = 1


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """The first device, on which everything runs."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    driver: tuple[int, int]
    """The newest CUDA that its driver speaks."""

    def __str__(self) -> str:
        capability, driver = (".".join(map(str, version)) for version in (self.capability, self.driver))
        memory = f"{self.memory_bytes / 2**30:.1f} GiB"
        return f"{self.name} (compute capability {capability}, {memory}, driver for CUDA {driver})"


def cuda_device() -> CudaDevice:
    """Ask NVIDIA's driver for its first device."""
    library = _library(_CUDA, "NVIDIA's driver")
    version, count, device = c_int(), c_int(), c_int()
    _cuda(library, "cuInit", c_uint32(0))
    _cuda(library, "cuDriverGetVersion", byref(version))
    _cuda(library, "cuDeviceGetCount", byref(count))
    if not count.value:
        raise BackendError("NVIDIA's driver finds no device (does CUDA_VISIBLE_DEVICES hide it?).")
    _cuda(library, "cuDeviceGet", byref(device), c_int(0))
    name, memory = ctypes.create_string_buffer(256), c_size_t()
    _cuda(library, "cuDeviceGetName", name, c_int(len(name)), device)
    _cuda(library, "cuDeviceTotalMem_v2", byref(memory), device)
    parts = (c_int(), c_int())
    for part, attribute in zip(parts, _CAPABILITY, strict=True):
        _cuda(library, "cuDeviceGetAttribute", byref(part), c_int(attribute), device)
    speaks = (version.value // 1000, version.value % 1000 // 10)
    return CudaDevice(name.value.decode(errors="replace"), (parts[0].value, parts[1].value), memory.value, speaks)


def free_cuda_memory() -> int | None:
    """Return how many bytes of the first device are free; None where the driver does not tell (any more)."""
    context, free, total = c_void_p(), c_size_t(), c_size_t()
    try:
        library = _library(_CUDA, "NVIDIA's driver")
        _cuda(library, "cuInit", c_uint32(0))
        _cuda(library, "cuDevicePrimaryCtxRetain", byref(context), c_int(0))
    except BackendError:
        return None
    try:
        _cuda(library, "cuCtxPushCurrent_v2", context)
        try:
            _cuda(library, "cuMemGetInfo_v2", byref(free), byref(total))
        finally:
            _cuda(library, "cuCtxPopCurrent_v2", byref(context))
    except BackendError:
        return None
    finally:
        library.cuDevicePrimaryCtxRelease_v2(c_int(0))
    return free.value


def cuda_fault() -> str | None:
    """Wait for what this thread has started on the device, and return the fault that it ended in, if any."""
    try:
        library = _library(_CUDA, "NVIDIA's driver")
    except BackendError:
        return None
    code = int(library.cuCtxSynchronize())
    return None if code in (0, _NO_CONTEXT) else _cuda_words(library, code)


def _require_opencl_device() -> None:
    """Ask the OpenCL drivers for a GPU."""
    library = _library(_OPENCL, "An OpenCL driver")
    count, found = c_uint32(), c_uint32()
    library.clGetPlatformIDs(c_uint32(0), None, byref(count))
    platforms = (c_void_p * count.value)()
    library.clGetPlatformIDs(count, platforms, None)
    for platform in platforms:
        library.clGetDeviceIDs(c_void_p(platform), c_uint64(_CL_GPU), c_uint32(0), None, byref(found))
        if found.value:
            return
    raise BackendError(f"OpenCL finds no GPU ({count.value} platforms).")


class _VulkanInstanceInfo(ctypes.Structure):
    """VkInstanceCreateInfo."""

    _fields_ = (
        ("type", c_uint32),
        ("next", c_void_p),
        ("flags", c_uint32),
        ("application", c_void_p),
        ("layer_count", c_uint32),
        ("layers", c_void_p),
        ("extension_count", c_uint32),
        ("extensions", c_void_p),
    )


def _require_vulkan_device() -> None:
    """Ask the Vulkan drivers for a device."""
    library = _library(_VULKAN, "A Vulkan driver")
    instance, count = c_void_p(), c_uint32()
    code = int(library.vkCreateInstance(byref(_VulkanInstanceInfo(type=_VK_INSTANCE_INFO)), None, byref(instance)))
    if code == 0:
        library.vkEnumeratePhysicalDevices(instance, byref(count), None)
        library.vkDestroyInstance(instance, None)
    if not count.value:
        raise BackendError("Vulkan finds no device" + (f" (its instance fails with {code})." if code else "."))


def _library(names: Iterable[str], what: str) -> Any:
    reason = ""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reason = reason or str(error)
    raise BackendError(f"{what} is not installed here: {reason}.")


def _cuda(library: Any, function: str, *arguments: Any) -> None:
    code = int(getattr(library, function)(*arguments))
    if code == _NO_DEVICE:
        raise BackendError("NVIDIA's driver finds no device (does CUDA_VISIBLE_DEVICES hide it?).")
    if code:
        raise BackendError(f"NVIDIA's driver fails at {function}: {_cuda_words(library, code)}.")


def _cuda_words(library: Any, code: int) -> str:
    text = c_char_p()
    library.cuGetErrorString(c_int(code), byref(text))
    return f"{(text.value or b'unknown error').decode(errors='replace')} ({code})"


# A fat binary: magic, version, size of its header, size of the rest; then entries of kind (1 PTX, 2 machine code),
# version, header's size, payload's size, …, architecture at 28 as 80 for 8.0. The layout is not documented by NVIDIA.
_FAT_MAGIC: Final = struct.pack("<IHH", 0xBA55ED50, 1, 16)
_PTX, _MACHINE_CODE = 1, 2
Code = tuple[bool, tuple[int, int]]


def cuda_code(files: Iterable[Path]) -> frozenset[Code]:
    """Return for which compute capabilities libraries hold device code, and whether each is PTX."""
    found: set[Code] = set()
    for file in files:
        try:
            with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                start = data.find(_FAT_MAGIC)
                while start >= 0:
                    found.update(_entries(data, start + 16, struct.unpack_from("<Q", data, start + 8)[0]))
                    start = data.find(_FAT_MAGIC, start + 16)
        except (OSError, ValueError, struct.error):
            continue
    return frozenset(found)


def _entries(data: mmap.mmap, position: int, size: int) -> Iterable[Code]:
    end = min(position + size, len(data))
    while position + 64 <= end:
        kind, _, header, payload = struct.unpack_from("<HHIQ", data, position)
        (architecture,) = struct.unpack_from("<I", data, position + 28)
        if kind not in (_PTX, _MACHINE_CODE) or header < 64:
            return
        yield kind == _PTX, divmod(architecture, 10)
        position += header + payload


def require_device(backend: str, library: str) -> None:
    """Raise BackendError unless a driver has a device for a backend that is no CPU.

    For CUDA the device also has to be one that the loaded libraries with `library` in their names were built for, as
    far as they show it, and the driver as new as CUDA's own library.
    """
    if backend == "opencl":
        return _require_opencl_device()
    if backend == "vulkan":
        return _require_vulkan_device()
    device, files = cuda_device(), _loaded_files()
    runtimes = (re.match(r"(?:lib)?cudart(?:\.so\.|64_)(\d{1,2})", file.name) for file in files)
    newest = max((int(name[1]) for name in runtimes if name), default=0)
    if newest > device.driver[0]:
        raise BackendError(
            f"The driver of {device} is too old for CUDA {newest}, for which it was built. Install a newer driver, or "
            f"what was built for CUDA {device.driver[0]}."
        )
    code = cuda_code(file for file in files if library in file.name.lower())
    if code and not _runs_on(code, device.capability):
        made = ", ".join(f"{major}.{minor}{' (PTX)' * ptx}" for ptx, (major, minor) in sorted(code))
        raise BackendError(f"It was built for compute capability {made}, and nothing of that runs on {device}.")
    return None


def _runs_on(code: Iterable[Code], capability: tuple[int, int]) -> bool:
    """Tell whether a device runs any of it: machine code of its own generation up to itself, or PTX up to itself."""
    return any(made <= capability and (ptx or made[0] == capability[0]) for ptx, made in code)


def _loaded_files() -> list[Path]:
    """Return the files that are mapped into this process; none where the system does not tell."""
    import psutil

    try:
        return [Path(entry.path) for entry in psutil.Process().memory_maps()]
    except (psutil.Error, OSError, AttributeError, NotImplementedError):
        return []
