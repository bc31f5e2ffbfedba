"""Which backends the installed MNN really has: asked of the runtime, because MNN itself falls back without an error."""

import functools
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Literal

from sa3_convert.errors import BackendError
from sa3_convert.mnn.capture import capture_stdout

Backend = Literal["cpu", "cuda", "opencl", "vulkan"]

BACKENDS: tuple[Backend, ...] = ("cpu", "cuda", "opencl", "vulkan")

# MNNForwardType in MNN's include/MNN/MNNForwardType.h. 13 is the CPU with AVX or the ARM extensions.
_FORWARD_TYPES: Mapping[int, str] = {0: "cpu", 1: "metal", 2: "cuda", 3: "opencl", 5: "nn", 7: "vulkan", 13: "cpu"}


@functools.cache
def load_mnn() -> ModuleType:
    """Import MNN quietly (its C++ code greets on standard output).

    Raises:
        BackendError: the package is not installed or cannot be loaded.

    """
    try:
        with capture_stdout():
            return importlib.import_module("MNN")
    except ImportError as error:
        raise BackendError(f"MNN's Python package cannot be imported ({error}). Install it: pip install MNN.") from None


@functools.cache
def has_backend(backend: Backend) -> bool:
    """Ask the runtime, once per process, whether it can run on this backend here."""
    # Once, because each call takes a reference to True that it does not own: some hundreds end the interpreter.
    with capture_stdout():
        _, present = load_mnn().Interpreter.createRuntime([{"backend": backend.upper()}])
    return bool(present[0])


def runtime_backends() -> dict[str, bool]:
    """Return, for every backend that the toolchain knows, whether the installed MNN has it.

    Raises:
        BackendError: MNN is not installed.

    """
    return {backend: has_backend(backend) for backend in BACKENDS}


def require_backend(backend: Backend) -> None:
    """Check that a backend is there.

    Raises:
        BackendError: it is not; the message says how to get one.

    """
    if not has_backend(backend):
        raise BackendError(
            f"The installed MNN has no {backend.upper()} backend (or finds no such device); MNN would run on the CPU "
            f"without saying so. Use --backend cpu, or install an MNN built with -DMNN_{backend.upper()}=ON: "
            "the wheels on PyPI for Linux hold the CPU backend only."
        )


def forward_type_name(code: int) -> str:
    """Return the backend's name for MNN's number of it."""
    return _FORWARD_TYPES.get(code, f"type {code}")
