"""What a diagnosis was made in: the machine, its GPUs, and the backends that MNN, ONNX Runtime and torch find."""

import importlib
from typing import Any

from sa3_convert.errors import BackendError
from sa3_convert.mnn.session import runtime_backends
from sa3_convert.system.machine import gpus, machine


def surroundings() -> dict[str, Any]:
    """Return what is there, JSON-ready. What is not installed or does not load is None."""
    found = machine()
    found["gpus"] = [{"name": gpu.name, "driver": gpu.driver, "memory_bytes": gpu.memory_bytes} for gpu in gpus()]
    return found | {
        "mnn_backends": _mnn_backends(),
        "onnxruntime_providers": _onnxruntime_providers(),
        "torch_cuda": _torch_cuda(),
    }


def _mnn_backends() -> dict[str, bool] | None:
    try:
        return runtime_backends()
    except BackendError:
        return None


def _onnxruntime_providers() -> list[str] | None:
    try:
        return list(importlib.import_module("onnxruntime").get_available_providers())
    except ImportError:
        return None


def _torch_cuda() -> dict[str, Any] | None:
    """Return torch's CUDA version (None for a CPU build) and whether it finds a device."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    return {"version": torch.version.cuda, "available": bool(torch.cuda.is_available())}
