"""Run a `.mnn` file: strict about names, dtypes and shapes, quiet, and never on another backend than asked.

A GPU backend of MNN hides failures of allocations, launches and copies: what was never written comes back as zeros. So
outputs hold a NaN of our own before each run, and so do the arrays that they are copied to.

On a CPU its exponential never gives less than e⁻⁸⁷, so that the weight of a masked key is a subnormal number. Products
with those take an x86 processor so long that a short prompt takes the text encoder twice its time; they are flushed.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.errors import BackendError, ModelFileError, Sa3Error
from sa3_convert.mnn.compatibility import FORWARD_TYPES, Backend, load_mnn, require_backend, require_reader
from sa3_convert.mnn.file.contents import ModelStorage
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.system.checked_files import named
from sa3_convert.system.log import capture_stdout
from sa3_convert.system.machine import default_threads, flushed_subnormals, short_slices
from sa3_convert.system.supervisor import working_on

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
_MARK: Final = 0x7FC5A3C1
_UNWRITTEN: Final[Mapping[np.dtype[Any], Any]] = {
    dtype: np.array(_MARK, np.uint32).view(dtype)[()] if dtype.itemsize == 4 else 0 for dtype in _TYPES
}
"""What is recognised when nothing was written over it: as float32 a NaN that no arithmetic makes, as int32 a number
that no model gives; bytes have no such value."""
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
        BackendError: MNN or the backend is not there, MNN is too old for the file, it chose another backend, or the
            GPU has too little memory.
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
        self._backend = backend
        self._marked: tuple[str, ...] = ()
        if backend != "cpu":
            self._marked = tuple(port.name for port in storage.outputs)
            self._weight_bytes = _least_weight_bytes(storage, memory)
            free = self._free_memory()
            if free is not None and self._weight_bytes > free:
                raise self._failure("does not fit into the device's memory")
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
        code = int(self._open().getSessionInfo(self._session, _INFO_BACKEND))
        return FORWARD_TYPES.get(code, f"type {code}")

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
            BackendError: on a GPU, the device ended in a fault, or left outputs unwritten.

        """
        self._check(feeds)
        with self._lock, working_on(self._path):
            self._open()
            self._recent.clear()
            self._resize(feeds)
            for name in self._marked:
                tensor, dtype = self._output_tensor(name), self._dtype(name, self._output_tensor(name))
                tensor.copyFrom(self._host_tensor(np.full(tensor.getShape(), _UNWRITTEN[dtype], dtype)))
            for name, array in feeds.items():
                self._input_tensor(name).copyFrom(self._host_tensor(np.ascontiguousarray(array)))
            with capture_stdout() as captured, flushed_subnormals(), short_slices():
                code = self._interpreter.runSession(self._session)
            self._note(captured.lines)
            if code != 0:
                raise self._failure(f"failed with error code {code} on {_shapes(feeds)}")
            results = {name: self._fetch(name, feeds) for name in self._outputs}
            if self._backend != "cpu":
                self._require_written(results)
            return results

    def _load(self, path: Path, config: Mapping[str, object], *, low_memory: bool) -> tuple[Any, Any]:
        # MNN's threads start here and keep what is set.
        with capture_stdout() as captured, flushed_subnormals(), short_slices():
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
            raise self._failure(
                "is not a model that MNN can load; it is damaged or was made for another version of MNN"
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
        dtype = self._dtype(name, tensor)
        host = self._host_tensor(np.full(shape, _UNWRITTEN[dtype], dtype))
        if not tensor.copyToHostTensor(host):
            raise self._failure(f"ran, but MNN could not copy {name} {list(shape)}")
        return np.array(host.getNumpyData().reshape(shape))

    def _require_written(self, results: Arrays) -> None:
        if self._backend == "cuda":
            from sa3_convert.system.gpu_drivers import cuda_fault

            if (fault := cuda_fault()) is not None:
                raise self._failure(f"ended in a fault of the device: {fault}")
        for name, array in results.items():
            left = int(np.count_nonzero(array.view(np.uint32) == _MARK)) if array.itemsize == 4 else 0
            if left:
                wrote = "nothing" if left == array.size else "a part"
                raise self._failure(
                    f"left {left} of {array.size} numbers of {name} as they were: the device reported nothing and "
                    f"wrote {wrote}"
                )

    def _free_memory(self) -> int | None:
        if self._backend != "cuda":
            return None
        from sa3_convert.system.gpu_drivers import free_cuda_memory

        return free_cuda_memory()

    def _failure(self, what: str) -> Sa3Error:
        """Return the error of a file that is at fault, or on a GPU of a device, with figures and what to try."""
        if self._backend == "cpu":
            return ModelFileError(f"{self._path} {what}{self._said()}")
        free = self._free_memory()
        there = "" if free is None else f", and {free / 2**20:.0f} MiB are free there"
        return BackendError(
            f"{self._path} on {self._backend} {what}{self._said()} Its weights alone take "
            f"{self._weight_bytes / 2**20:.0f} MiB of the device's memory{there}. Try less --seconds, close what else "
            f"uses the device, see what `sa3-convert doctor --backend {self._backend}` finds, or use --device cpu."
        )

    def _open(self) -> Any:
        if self._interpreter is None:
            raise ValueError(f"the session of {self._path} is closed")
        return self._interpreter

    def _note(self, lines: Sequence[str]) -> None:
        self._messages.update(dict.fromkeys(lines))
        self._recent += lines

    def _said(self) -> str:
        return f". MNN said: {' | '.join(dict.fromkeys(self._recent))}" if self._recent else "."


def _least_weight_bytes(storage: ModelStorage, memory: Level) -> int:
    """Return what weights take on a GPU at least: as halves, or as they are stored where they are kept so."""
    if memory == "low":
        return sum(weight.payload.bytes for _, weight in storage.weighted())
    return sum(2 * weight.elements for _, weight in storage.weighted())


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    return len(shape) == len(declared) and all(
        wanted in (-1, actual) for actual, wanted in zip(shape, declared, strict=True)
    )


def _shapes(feeds: Arrays) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
