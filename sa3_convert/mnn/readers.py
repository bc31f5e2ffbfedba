"""The oldest MNN that reads and runs a `.mnn`, by what is in it.

A runtime refuses a whole file for one kind of parameter that its schema lacks ("Invalidate buffer"), an operator for a
function that it lacks ("can not execute"), and crashes (SIGFPE) on scales that it does not look for. So it does not
matter which converter wrote a file, but what it holds. Source: `schema/default/*.fbs` at each version's tag; what
occurs in converted Stable Audio models was also measured with the wheels of 3.0.0 to 3.6.1 on x86-64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from sa3_convert.errors import BackendError, ConversionError
from sa3_convert.mnn.contents import ModelStorage, OperatorStorage
from sa3_convert.mnn.target import is_older, version_numbers

OLDEST_KNOWN: Final = "3.0"


@dataclass(frozen=True, slots=True)
class _Novelty:
    since: str
    what: str
    is_in: Callable[[OperatorStorage], bool]


def _parameter(kind: int) -> Callable[[OperatorStorage], bool]:
    return lambda operator: operator.parameter_kind == kind


def _function(name: str) -> Callable[[OperatorStorage], bool]:
    return lambda operator: operator.function == name


def _has_half_scales(operator: OperatorStorage) -> bool:
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
    """What no older one knows, and where; empty when nothing rules out the oldest known."""

    def __str__(self) -> str:
        """Return "MNN 3.6 or newer" with the reason."""
        return f"MNN {self.version} or newer" + (f" ({self.because})" if self.because else "")


def oldest_reader(storage: ModelStorage) -> Reader:
    """Return the oldest MNN that reads and runs a file."""
    found = max(_found(storage), key=lambda item: version_numbers(item[0].since), default=None)
    if found is None:
        return Reader(OLDEST_KNOWN, "")
    novelty, operator = found
    return Reader(novelty.since, f"{novelty.what}, in {operator.name}")


def check_reader(storage: ModelStorage, target: str) -> None:
    """Hold a file to the version that it was made for.

    Raises:
        ConversionError: that version cannot read or run it.

    """
    reader = oldest_reader(storage)
    if is_older(target, reader.version):
        raise ConversionError(
            f"{storage.path.name} is to be right on MNN {target}, but only {reader} reads it. "
            f"Convert with --target-mnn {reader.version}, or report this."
        )


def require_reader(storage: ModelStorage, installed: str) -> None:
    """Refuse a file that the installed MNN would refuse itself or, in some cases, crash on.

    Raises:
        BackendError: MNN is too old for it.

    """
    reader = oldest_reader(storage)
    if is_older(installed, reader.version):
        raise BackendError(
            f"{storage.path} needs {reader}; {installed} is installed. Upgrade MNN, or convert for it with "
            f"`--target-mnn` and, for MNN before 3.6, `--recipe portable`."
        )


def _found(storage: ModelStorage) -> Iterator[tuple[_Novelty, OperatorStorage]]:
    for operator in storage.operators:
        for novelty in _NOVELTIES:
            if novelty.is_in(operator):
                yield novelty, operator
