"""Run a `.mnn` file: strict about names, dtypes and shapes, quiet, and never on another backend than asked."""

import functools
import importlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.errors import BackendError, ModelFileError
from sa3_convert.mnn.compatibility import require_reader
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.system.checked_files import named
from sa3_convert.system.log import capture_stdout
from sa3_convert.system.machine import default_threads
from sa3_convert.system.supervisor import working_on

Backend = Literal["cpu", "cuda", "opencl", "vulkan"]

BACKENDS: tuple[Backend, ...] = ("cpu", "cuda", "opencl", "vulkan")

# MNNForwardType in MNN's include/MNN/MNNForwardType.h. 13 is the CPU with AVX or the ARM extensions.
_FORWARD_TYPES: Mapping[int, str] = {0: "cpu", 1: "metal", 2: "cuda", 3: "opencl", 5: "nn", 7: "vulkan", 13: "cpu"}


@functools.cache
def load_mnn() -> ModuleType:
    """Import MNN quietly (its C++ code greets on standard output)."""
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
    """Return, for every backend that the toolchain knows, whether the installed MNN has it."""
    return {backend: has_backend(backend) for backend in BACKENDS}


def require_backend(backend: Backend) -> None:
    """Raise BackendError, which says how to get one, if a backend is not there."""
    if not has_backend(backend):
        raise BackendError(
            f"The installed MNN has no {backend.upper()} backend (or finds no such device); MNN would run on the CPU "
            f"without saying so. Use --backend cpu, or install an MNN built with -DMNN_{backend.upper()}=ON: "
            "the wheels on PyPI for Linux hold the CPU backend only."
        )


def forward_type_name(code: int) -> str:
    """Return the backend's name for MNN's number of it."""
    return _FORWARD_TYPES.get(code, f"type {code}")


Level = Literal["normal", "high", "low"]

# BackendConfig in MNN's include/MNN/MNNForwardType.h. Given as words they would be ignored without an error.
_LEVELS: Mapping[Level, int] = {"normal": 0, "high": 1, "low": 2}
_POWER_NORMAL = 0
# Interpreter::SessionInfoCode
_INFO_MEMORY, _INFO_BACKEND = 0, 2
# Interpreter::HintMode: DYNAMIC_QUANT_OPTIONS; 2 quantises activations per block, 3 dB closer at no measurable cost.
_HINT_DYNAMIC_QUANT, _PER_BLOCK = 5, 2
_TYPES: Mapping[np.dtype[Any], str] = {
    np.dtype(np.float32): "Halide_Type_Float",
    np.dtype(np.int32): "Halide_Type_Int",
    np.dtype(np.uint8): "Halide_Type_Uint8",
}
# The bindings raise these bare, whatever went wrong; their subclasses mean something else.
_BINDING_ERRORS = (Exception, SystemError)


@dataclass(frozen=True, slots=True)
class DeclaredPort:
    """An input as the file declares it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """-1 stands for a dynamic dimension."""


class MnnSession:
    """A loaded `.mnn` model. Numbers are not judged here: non-finite values are returned as they are.

    One session runs one call at a time (calls from several threads wait for each other); two sessions run in parallel.

    Args:
        path: the file; a model with separate weights has `<path>.weight` beside it.
        inputs: the names of its inputs, all of them; None takes them from the file.
        outputs: names of the outputs that `run` returns, None for all; intermediate tensors that survived conversion
            work as well.
        threads: None is one per usable core.
        memory: "normal" unpacks quantised weights to float when loading; "low" keeps them and quantises activations.
        precision: matters on GPUs and ARM; x86 computes in float32 whatever it says.
        backend: where to run.

    Raises:
        BackendError: MNN or the backend is not there, MNN is too old for the file, or it chose another backend.
        ModelFileError: the file is missing, damaged, or has other inputs or outputs than named.

    """

    def __init__(
        self,
        path: Path,
        *,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        threads: int | None = None,
        memory: Level = "normal",
        precision: Level = "high",
        backend: Backend = "cpu",
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        self._path = named(path)
        self._lock = threading.Lock()
        self._messages: dict[str, None] = {}
        self._recent: list[str] = []
        self._mnn: Any = load_mnn()
        # MNN trusts a file: a damaged one can end the process, and missing or short weights are read as noise.
        storage = read_storage(path)
        require_reader(storage, self._mnn.version())
        self.weight_file_bytes = storage.weight_file_bytes
        """Of the `.weight` file that was loaded with it; 0 is none."""
        require_backend(backend)
        config = {
            "backend": backend.upper(),
            "numThread": threads or default_threads(),
            "memory": _LEVELS[memory],
            "precision": _LEVELS[precision],
            "power": _POWER_NORMAL,
            # Without this a tensor that other operators read is not kept, and an output may be one.
            "saveTensors": tuple(outputs or ()),
        }
        with working_on(self._path):
            self._interpreter, self._session = self._load(path, config, low_memory=memory == "low")
            self._inputs = self._declared(inputs)
            self._outputs = tuple(self._interpreter.getSessionOutputAll(self._session) if outputs is None else outputs)
            for name in self._outputs:
                self._output_tensor(name)
            found = self.backend_in_use
        if found != backend:
            self.close()
            raise BackendError(f"{self._path} was to run on {backend}, but MNN would run it on {found}.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory. The session cannot be run afterwards."""
        with self._lock, working_on(self._path):
            self._session = self._interpreter = None

    @property
    def inputs(self) -> Mapping[str, DeclaredPort]:
        """The inputs as the file declares them, in the order in which they were named."""
        return self._inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs that `run` returns."""
        return self._outputs

    @property
    def backend_in_use(self) -> str:
        """The backend that MNN really runs the model on, as MNN reports it."""
        return forward_type_name(int(self._open().getSessionInfo(self._session, _INFO_BACKEND)))

    @property
    def memory_mb(self) -> float:
        """Memory of unpacked weights and activations in MiB, as MNN reports it; its copy of the file comes on top."""
        return float(self._open().getSessionInfo(self._session, _INFO_MEMORY))

    @property
    def messages(self) -> tuple[str, ...]:
        """What MNN printed so far, each line once: a GPU backend names the operators that fell back to the CPU."""
        return tuple(self._messages)

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; see `sa3_convert.arrays.Session.run`.

        Raises:
            ValueError: a feed is missing, unknown, or of another dtype or shape than the model declares; or the
                session is closed.
            ModelFileError: MNN could not run the model with these feeds, or returned an empty output.

        """
        self._check(feeds)
        with self._lock, working_on(self._path):
            self._open()
            self._recent.clear()
            self._resize(feeds)
            for name, array in feeds.items():
                self._input_tensor(name).copyFrom(self._host_tensor(np.ascontiguousarray(array)))
            with capture_stdout() as captured:
                code = self._interpreter.runSession(self._session)
            self._note(captured.lines)
            if code != 0:
                raise ModelFileError(f"{self._path} failed with error code {code} on {_shapes(feeds)}{self._said()}")
            return {name: self._fetch(name, feeds) for name in self._outputs}

    def _load(self, path: Path, config: Mapping[str, object], *, low_memory: bool) -> tuple[Any, Any]:
        with capture_stdout() as captured:
            try:
                interpreter = self._mnn.Interpreter(str(path))
                if low_memory:
                    interpreter.setSessionHint(_HINT_DYNAMIC_QUANT, _PER_BLOCK)
                session = interpreter.createSession(config)
                failure = None
            except Exception as error:
                if type(error) not in _BINDING_ERRORS:
                    raise
                failure = str(error)
        self._note(captured.lines)
        if failure is not None:
            raise ModelFileError(
                f"{self._path} is not a model that MNN can load; it is damaged or was made for another version of MNN"
                f"{self._said()}"
            )
        return interpreter, session

    def _declared(self, names: Sequence[str] | None) -> dict[str, DeclaredPort]:
        tensors = self._interpreter.getSessionInputAll(self._session)
        if names is None:
            names = tuple(tensors)
        if set(tensors) != set(names):
            raise ModelFileError(
                f"{self._path} has the inputs {', '.join(sorted(tensors))}; expected {', '.join(sorted(names))}."
            )
        return {name: DeclaredPort(self._dtype(name, tensors[name]), tuple(tensors[name].getShape())) for name in names}

    def _dtype(self, name: str, tensor: Any) -> np.dtype[Any]:
        kind = tensor.getDataType()
        for dtype, constant in _TYPES.items():
            if kind == getattr(self._mnn, constant):
                return dtype
        raise ModelFileError(f"{self._path}: {name} has a type that no Stable Audio 3 model has.")

    def _host_tensor(self, array: NDArray[Any]) -> Any:
        kind = getattr(self._mnn, _TYPES[array.dtype])
        return self._mnn.Tensor(array.shape, kind, array, self._mnn.Tensor_DimensionType_Caffe)

    def _input_tensor(self, name: str) -> Any:
        return self._interpreter.getSessionInput(self._session, name)

    def _output_tensor(self, name: str) -> Any:
        with capture_stdout():
            try:
                return self._interpreter.getSessionOutput(self._session, name)
            except Exception as error:
                if type(error) not in _BINDING_ERRORS:
                    raise
                available = sorted(self._interpreter.getSessionOutputAll(self._session))
        raise ModelFileError(f"{self._path} has no output {name!r}; it has {', '.join(available)}.")

    def _check(self, feeds: Arrays) -> None:
        if feeds.keys() != self._inputs.keys():
            raise ValueError(f"{self._path} takes {', '.join(self._inputs)}, not {', '.join(feeds) or 'nothing'}")
        for name, port in self._inputs.items():
            array = feeds[name]
            if array.dtype != port.dtype:
                raise ValueError(f"{name} is {array.dtype}, {self._path} takes {port.dtype}")
            # MNN itself reads beyond or short of an array whose shape is not what the graph expects.
            if array.size == 0 or not _fits(array.shape, port.shape):
                raise ValueError(f"{name} is {list(array.shape)}, {self._path} takes {list(port.shape)} (-1 is any)")

    def _resize(self, feeds: Arrays) -> None:
        """Give the session the feeds' shapes; there is no cache of shapes, so only when one changed."""
        tensors = {name: self._input_tensor(name) for name in feeds}
        changed = [name for name, tensor in tensors.items() if tuple(tensor.getShape()) != feeds[name].shape]
        if not changed:
            return
        for name in changed:
            self._interpreter.resizeTensor(tensors[name], feeds[name].shape)
        with capture_stdout() as captured:
            self._interpreter.resizeSession(self._session)
        self._note(captured.lines)

    def _fetch(self, name: str, feeds: Arrays) -> NDArray[Any]:
        """Copy an output to an array of its own, in the order of dimensions that the graph declares."""
        tensor = self._output_tensor(name)
        shape = tuple(tensor.getShape())
        if any(size <= 0 for size in shape):
            raise ModelFileError(
                f"{self._path} returned {name} empty, {list(shape)}, on {_shapes(feeds)}{self._said()}"
            )
        host = self._host_tensor(np.zeros(shape, self._dtype(name, tensor)))
        if not tensor.copyToHostTensor(host):
            raise ModelFileError(f"{self._path}: MNN could not copy {name} {list(shape)}{self._said()}")
        return np.array(host.getNumpyData().reshape(shape))

    def _open(self) -> Any:
        if self._interpreter is None:
            raise ValueError(f"the session of {self._path} is closed")
        return self._interpreter

    def _note(self, lines: Sequence[str]) -> None:
        self._messages.update(dict.fromkeys(lines))
        self._recent += lines

    def _said(self) -> str:
        return f". MNN said: {' | '.join(dict.fromkeys(self._recent))}" if self._recent else "."


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    return len(shape) == len(declared) and all(
        wanted in (-1, actual) for actual, wanted in zip(shape, declared, strict=True)
    )


def _shapes(feeds: Arrays) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
