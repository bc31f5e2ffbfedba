"""What this machine is: processors, memory, GPUs, and the versions of all that takes part."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import sa3_convert


@cache
def version_of(distribution: str) -> str:
    """Return the installed version of a distribution, or of the one that holds the module of this name.

    Nothing is imported. It is 'absent' when there is neither.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    # Builds with CUDA go by other names: onnxruntime-gpu, MNN_cuda.
    others = importlib.metadata.packages_distributions().get(distribution, ())
    return next((importlib.metadata.version(name) for name in others), "absent")


_T = TypeVar("_T")
_TOPOLOGY: Final = Path("/sys/devices/system/cpu")


def usable_processors() -> int:
    """Return how many processors this process may use."""
    return len(_usable()) or os.cpu_count() or 1


def default_threads(topology: Path = _TOPOLOGY) -> int:
    """Return the number of threads to compute with when nobody says: one per usable physical core.

    Two threads on one core share its arithmetic units, which a single one keeps busy.

    Args:
        topology: where Linux describes its processors; what it does not describe counts as a core of its own.

    """
    if not topology.is_dir():
        physical = _asked(lambda psutil: psutil.cpu_count(logical=False))
        return min(physical or usable_processors(), usable_processors())
    cores = {_siblings(topology / f"cpu{number}/topology/thread_siblings_list", number) for number in _usable()}
    return len(cores) or usable_processors()


def _usable() -> set[int]:
    """Return the numbers of the processors that this process may use; none where the system does not tell."""
    return set(_asked(lambda psutil: psutil.Process().cpu_affinity()) or ())


def _asked(question: Callable[[Any], _T]) -> _T | None:
    """Return what psutil answers; None where the system does not tell."""
    import psutil

    try:
        return question(psutil)
    except (psutil.Error, OSError, AttributeError, NotImplementedError):
        return None


def _siblings(file: Path, number: int) -> str:
    """Return what processors of one core have in common."""
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return str(number)


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


_FENV_MXCSR: Final = 7
"""Which 32-bit word of glibc's and musl's fenv_t on x86-64 is the register with the modes below."""
_FLUSH_TO_ZERO, _DENORMALS_ARE_ZERO = 1 << 15, 1 << 6


@contextlib.contextmanager
def flushed_subnormals() -> Iterator[None]:
    """Take numbers below 1.2·10⁻³⁸ for zero in this thread, and for good in threads that it starts within the block.

    An x86 processor spends a hundred cycles and more on each of them. Done on x86-64 Linux alone.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        yield
        return
    library, before = _c_library(), (ctypes.c_uint32 * 8)()
    library.fegetenv(before)
    within = type(before).from_buffer_copy(before)
    within[_FENV_MXCSR] |= _FLUSH_TO_ZERO | _DENORMALS_ARE_ZERO
    library.fesetenv(within)
    try:
        yield
    finally:
        library.fesetenv(before)


_SET_ATTRIBUTES: Final = {"x86_64": 314, "aarch64": 274}
"""Linux's number of `sched_setattr(2)`; that of `sched_getattr` is the next."""
_POLICIES_WITH_SLICES: Final = (0, 3)
_SLICE: Final = 100_000
"""Nanoseconds: the shortest that Linux gives."""


class _Schedule(ctypes.Structure):
    """Linux's `struct sched_attr`."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("slice", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


@contextlib.contextmanager
def short_slices() -> Iterator[None]:
    """Take the processor for short slices in this thread, and for good in threads that it starts within the block.

    MNN's threads yield while they wait for one another. Who yields gives its slice away, milliseconds as a rule, and
    beside busy processes its turn with it. Done on Linux alone, where it knows slices (6.12).
    """
    before = _schedule()
    if not before.slice or before.policy not in _POLICIES_WITH_SLICES:
        yield
        return
    within = _Schedule.from_buffer_copy(before)
    within.slice = _SLICE
    _set_schedule(within)
    try:
        yield
    finally:
        _set_schedule(before)


def _schedule() -> _Schedule:
    """Return how this thread is scheduled; zeros where the system does not tell."""
    found = _Schedule()
    if sys.platform == "linux" and (number := _SET_ATTRIBUTES.get(platform.machine())) is not None:
        _c_library().syscall(number + 1, 0, ctypes.byref(found), ctypes.sizeof(found), 0)
    return found


def _set_schedule(wanted: _Schedule) -> None:
    """Change how this thread is scheduled; what is refused stays as it is."""
    _c_library().syscall(_SET_ATTRIBUTES[platform.machine()], 0, ctypes.byref(wanted), 0)


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


def gpu_state() -> str:
    """Return names, driver and free memory of the devices in words, for messages."""
    with _nvml() as nvml:
        if nvml is None:
            return "no NVIDIA driver answers, or nvidia-ml-py is not installed to ask it"
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        memory = ((_text(nvml.nvmlDeviceGetName(one)), nvml.nvmlDeviceGetMemoryInfo(one)) for one in handles)
        free = (f"{name} has {int(m.free) >> 20} of {int(m.total) >> 20} MiB free" for name, m in memory)
        return "; ".join((f"driver {driver}", *free))


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


TOOLS = ("MNN", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "tokenizers", "torch")


def tool_versions() -> dict[str, str]:
    """Return versions by name, this package and Python included; asks the installed metadata and imports nothing."""
    return {
        "sa3-convert": sa3_convert.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
    } | {name: version_of(name) for name in TOOLS}


_INTERESTING = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
"""Instruction sets that decide how fast integer products are."""


def architecture() -> str:
    """Return the kind of processor under one name on every system: `x86_64`, `aarch64`, or what it calls itself."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def machine() -> dict[str, Any]:
    """Return processor, cores, memory, system and versions, JSON-ready; what the system does not tell is None."""
    model, flags = _processor(Path("/proc/cpuinfo"))
    return {
        "processor": model or platform.processor() or platform.machine(),
        "instructions": [name for name in _INTERESTING if name in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable_processors(),
        "memory_bytes": _asked(lambda psutil: psutil.virtual_memory().total),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": tool_versions(),
    }


_INTEGER_PRODUCTS = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
"""Instructions that multiply and add 8-bit integers four times as fast as floats, or faster."""


def integer_products(description: Path = Path("/proc/cpuinfo")) -> str | None:
    """Return the instruction by which this processor multiplies 8-bit integers fast; None where there is none known."""
    flags = _processor(description)[1]
    return next((name for name in _INTEGER_PRODUCTS if name in flags), None)


def _processor(file: Path) -> tuple[str | None, frozenset[str]]:
    """Return model name and instruction sets from the kernel's description."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, frozenset()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields.get("model name"), frozenset((fields.get("flags") or fields.get("Features") or "").split())


_GROUP: Final = Path("/sys/fs/cgroup")


def available_memory(group: Path = _GROUP) -> int | None:
    """Return how much memory a process can still get, swap included: of the machine, and of its control group."""
    free = _asked(lambda psutil: int(psutil.virtual_memory().available + psutil.swap_memory().free))
    limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    if free is None or limit is None or used is None:
        return free
    return min(free, max(0, limit - used))


def _number(file: Path) -> int | None:
    """Return a control group's number; None for `max` and where there is none."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None


def peak_memory() -> int | None:
    """Return this process's largest resident size so far, in bytes; None where the system does not tell."""
    with contextlib.suppress(OSError):
        # Unlike ru_maxrss this does not count what the parent had before it started this program.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _asked(lambda psutil: int(psutil.Process().memory_info().peak_wset))
