"""Which MNN: the oldest that a conversion is for and that reads a file, and what the installed one can run on here."""

import functools
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Final, Literal

from sa3_convert.errors import BackendError, ConversionError, UsageError
from sa3_convert.system.log import capture_stdout

if TYPE_CHECKING:
    from sa3_convert.mnn.file.contents import ModelStorage, OperatorStorage
    from sa3_convert.recipe import ComponentRecipe

MnnVersion = Literal["3.0", "3.1", "3.5", "3.6"]

DEFAULT_TARGET: Final[MnnVersion] = "3.1"
"""What costs nothing: 3.0 does not know SiLU as one operator."""
_HALF_SCALES: Final[MnnVersion] = "3.6"
"""Measured: MNN 3.5.0 and before look for float32 scales, find none, and divide by their number (SIGFPE)."""


def version_numbers(version: str) -> tuple[int, ...]:
    """Return up to three numbers in front, which order versions: a build of one's own may have more behind them."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def is_older(version: str, than: str) -> bool:
    """Whether a version came before another."""
    return version_numbers(version) < version_numbers(than)


def target_for(recipe: "ComponentRecipe", asked: MnnVersion | None) -> MnnVersion:
    """Return the oldest MNN that a component is made for: what is asked, else the oldest that costs nothing."""
    has_half_scales = recipe.weights is not None and recipe.weights.scales == "fp16"
    oldest = _HALF_SCALES if has_half_scales else DEFAULT_TARGET
    if asked is None:
        return oldest
    if has_half_scales and is_older(asked, oldest):
        raise UsageError(
            f"MNN {asked} cannot read scales: fp16, which the recipe asks for: it crashes. "
            f"Use scales: fp32 in the recipe, or --target-mnn {oldest}."
        )
    return asked


OLDEST_KNOWN: Final = "3.0"


@dataclass(frozen=True, slots=True)
class _Novelty:
    since: str
    what: str
    is_in: "Callable[[OperatorStorage], bool]"


def _parameter(kind: int) -> "Callable[[OperatorStorage], bool]":
    return lambda operator: operator.parameter_kind == kind


def _function(name: str) -> "Callable[[OperatorStorage], bool]":
    return lambda operator: operator.function == name


def _has_half_scales(operator: "OperatorStorage") -> bool:
    return operator.weight is not None and operator.weight.scale_type == "fp16"


_NOVELTIES: Final = (
    _Novelty("3.1", "Stft", _parameter(99)),
    _Novelty("3.1", "SiLU as one operator", _function("silu")),
    _Novelty("3.5", "LinearAttention", _parameter(100)),
    _Novelty("3.5", "Shape with start or end", _parameter(101)),
    _Novelty("3.6", "FP16 scales", _has_half_scales),
    _Novelty("3.6.1", "RoPE as one operator", _parameter(102)),
    _Novelty("3.6.1", "x·SiLU as one operator", _function("mul_silu")),
)


@dataclass(frozen=True, slots=True)
class Reader:
    """The oldest MNN for a file."""

    version: str
    because: str
    """What no older one knows, and where, or why none is named; empty when nothing rules out the oldest known."""

    def __str__(self) -> str:
        """Return "MNN 3.6 or newer" with the reason."""
        return f"MNN {self.version} or newer" + (f" ({self.because})" if self.because else "")


def oldest_reader(storage: "ModelStorage") -> Reader:
    """Return the oldest MNN that reads and runs a file."""
    found = max(_found(storage), key=lambda item: version_numbers(item[0].since), default=None)
    if found is None:
        written = storage.mnn_version
        early = written is not None and is_older(written, OLDEST_KNOWN)
        return Reader(OLDEST_KNOWN, f"written by {written}; before {OLDEST_KNOWN} nothing was tried" if early else "")
    novelty, operator = found
    return Reader(novelty.since, f"{novelty.what}, in {operator.name}")


def check_reader(storage: "ModelStorage", target: str) -> None:
    """Raise if the version that a file was made for cannot read or run it."""
    reader = oldest_reader(storage)
    if is_older(target, reader.version):
        raise ConversionError(
            f"{storage.path.name} is to be right on MNN {target}, but only {reader} reads it. "
            f"Convert with --target-mnn {reader.version}, or report this."
        )


def require_reader(storage: "ModelStorage", installed: str) -> None:
    """Refuse a file that the installed MNN would refuse itself or, in some cases, crash on."""
    reader = oldest_reader(storage)
    if is_older(installed, reader.version):
        raise BackendError(
            f"{storage.path} needs {reader}; {installed} is installed. Upgrade MNN, or convert for it with "
            f"`--target-mnn` and, for MNN before 3.6, `--recipe portable`."
        )


def _found(storage: "ModelStorage") -> Iterator["tuple[_Novelty, OperatorStorage]"]:
    for operator in storage.operators:
        for novelty in _NOVELTIES:
            if novelty.is_in(operator):
                yield novelty, operator


Backend = Literal["cpu", "cuda", "opencl", "vulkan"]

BACKENDS: tuple[Backend, ...] = ("cpu", "cuda", "opencl", "vulkan")

# MNNForwardType in MNN's include/MNN/MNNForwardType.h. 13 is the CPU with AVX or the ARM extensions.
FORWARD_TYPES: Mapping[int, str] = {0: "cpu", 1: "metal", 2: "cuda", 3: "opencl", 5: "nn", 7: "vulkan", 13: "cpu"}


@functools.cache
def load_mnn() -> ModuleType:
    """Import MNN quietly (its C++ code greets on standard output)."""
    try:
        with capture_stdout():
            return importlib.import_module("MNN")
    except ImportError as error:
        # One that was built here needs CUDA's or OpenCL's libraries; the message names the one that is missing.
        raise BackendError(
            f"MNN's Python package cannot be imported ({error}). Install it: pip install MNN; or, if it was built "
            "here, what it says is missing."
        ) from None


def mnn_version() -> str:
    """Return the version of the MNN that runs, as it says itself; 'absent' where it cannot be imported.

    Packages that were built elsewhere have other names, or none, so metadata do not tell.
    """
    try:
        return str(load_mnn().version())
    except BackendError:
        return "absent"


@functools.cache
def _missing(backend: Backend) -> str | None:
    """Return, asking once per process, why MNN cannot run on a backend here; None if it can.

    Once, because each question takes a reference to True that it does not own: some hundreds end the interpreter.
    """
    with capture_stdout():
        _, present = load_mnn().Interpreter.createRuntime([{"backend": backend.upper()}])
    if not present[0]:
        return (
            f"The installed MNN {mnn_version()} has no {backend.upper()} backend; MNN would run on the CPU without "
            f"saying so. Use --backend cpu, or install an MNN built with -DMNN_{backend.upper()}=ON: the wheels on "
            "PyPI for Linux hold the CPU backend only."
        )
    if backend == "cpu":
        return None
    from sa3_convert.system.gpu_drivers import require_device

    # MNN makes a runtime without a device, a driver or code for the device, too, and then computes nothing.
    try:
        require_device(backend, "mnn")
    except BackendError as error:
        return f"MNN {mnn_version()} has a {backend.upper()} backend, but cannot use it here. {error}"
    return None


def has_backend(backend: Backend) -> bool:
    """Tell whether MNN can run on this backend here: it has it, and the driver says that there is a device for it."""
    return _missing(backend) is None


def runtime_backends() -> dict[str, bool]:
    """Return, for every backend that the toolchain knows, whether MNN can run on it here."""
    return {backend: has_backend(backend) for backend in BACKENDS}


def require_backend(backend: Backend) -> None:
    """Raise BackendError, which says what is missing and how to get it, if MNN cannot run on a backend here."""
    if (missing := _missing(backend)) is not None:
        raise BackendError(missing)
