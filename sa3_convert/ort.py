"""Run an ONNX file with ONNX Runtime: on the CPU, the reference that every converted model is compared with."""

import contextlib
import functools
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from sa3_convert.arrays import Arrays, Placed
from sa3_convert.errors import BackendError, ModelFileError
from sa3_convert.system.checked_files import named
from sa3_convert.system.gpu_drivers import cuda_device
from sa3_convert.system.log import is_shown, note
from sa3_convert.system.machine import default_threads, gpu_state, version_of
from sa3_convert.system.supervisor import working_on

_DTYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
_CUDA = "CUDAExecutionProvider"
_CUDA_OPTIONS = {
    # Products of float32 stay float32 products.
    "use_tf32": "0",
    # By the shape alone, not by the clock: the same algorithm, and so the same sums, in every run.
    "cudnn_conv_algo_search": "HEURISTIC",
    # Twice what was needed so far would often not fit beside another model.
    "arena_extend_strategy": "kSameAsRequested",
}
_BYTES_PRODUCT = (
    b'\x08\x08:\\\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01gZ\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02'
    b"\x08\x02\n\x02\x08\x08Z\x13\n\x01b\x12\x0e\n\x0c\x08\x03\x12\x08\n\x02\x08\x08\n\x02\x08\x10b\x13\n\x01y\x12\x0e\n\x0c"
    b"\x08\x06\x12\x08\n\x02\x08\x02\n\x02\x08\x10B\x04\n\x00\x10\n"
)
"""An ONNX model: y = MatMulInteger(a, b), of uint8 [2, 8] and int8 [8, 16]."""
# ONNX Runtime's exceptions have no base of their own below Exception, and bound inputs and outputs fail with Python's.
_FAILURES = (
    failures.EPFail,
    failures.Fail,
    failures.InvalidArgument,
    failures.InvalidGraph,
    failures.InvalidProtobuf,
    failures.NoModel,
    failures.NoSuchFile,
    failures.NotImplemented,
    failures.RuntimeException,
    RuntimeError,
)


class OrtSession:
    """A loaded ONNX model.

    Weights in external data are mapped, not read. Unless asked for more, graph optimisation stays at `ORT_ENABLE_BASIC`
    (folding of constants, removal of what does nothing): on all five components of true size its results are bit for
    bit those without any optimisation, while `ORT_ENABLE_ALL` moves the text encoder by 121 dB and the decoder by
    129 dB.

    Args:
        path: the `.onnx` file, its external data beside it.
        threads: threads of one operator; None is one per usable physical core.
        outputs: names of the outputs that `run` returns; None is all.
        optimise: let ONNX Runtime fuse and rearrange operators (`ORT_ENABLE_ALL`): faster, no longer bit for bit.
            Quantised models need it, because their integer operators are fused only then.
        device: where to run; on CUDA, operators that it lacks run on the CPU.

    Raises:
        BackendError: this ONNX Runtime has no CUDA, or it did not start.
        ModelFileError: the file or its external data is missing or damaged, or holds what ONNX Runtime cannot run.
        ValueError: `outputs` names something that is no output of the model.

    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        outputs: Sequence[str] | None = None,
        optimise: bool = False,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        name = named(path)
        if not path.is_file():
            raise ModelFileError(f"{name} does not exist. Export the checkpoint first.")
        self._path = name
        self._session = _load(path, threads, optimise, device)
        self._placed = Placed(functools.partial(ort.OrtValue.ortvalue_from_numpy, device_type=device))
        self._inputs = {port.name: port for port in self._session.get_inputs()}
        if strange := [f"{name} ({port.type})" for name, port in self._inputs.items() if port.type not in _DTYPES]:
            raise ModelFileError(f"{name} has inputs of a type that no Stable Audio 3 model has: {', '.join(strange)}.")
        available = [port.name for port in self._session.get_outputs()]
        self._outputs = list(available if outputs is None else outputs)
        if unknown := sorted(set(self._outputs) - set(available)):
            raise ValueError(f"{name} has no output {', '.join(unknown)}; it has {', '.join(available)}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in the model's order."""
        return tuple(self._inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs that `run` returns."""
        return tuple(self._outputs)

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; see `Session.run`.

        Raises:
            ValueError: a feed is missing, unknown, or of another dtype or shape than the model declares.
            ModelFileError: the feeds are as declared and ONNX Runtime still cannot run the model with them.

        """
        self._check(feeds)
        try:
            with working_on(self._path):
                binding = self._session.io_binding()
                for name, array in ((name, np.ascontiguousarray(array)) for name, array in feeds.items()):
                    placed = self._placed.place if array.flags.writeable else self._placed
                    binding.bind_ortvalue_input(name, placed(array))
                for name in self._outputs:
                    binding.bind_output(name)
                self._session.run_with_iobinding(binding)
                results = binding.copy_outputs_to_cpu()
        except _FAILURES as error:
            _refuse_without_memory(self._path, error)
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise ModelFileError(f"{self._path} cannot be run with {shapes}: {error}") from None
        return dict(zip(self._outputs, results, strict=True))

    def _check(self, feeds: Arrays) -> None:
        if feeds.keys() != self._inputs.keys():
            raise ValueError(f"{self._path} takes {', '.join(self._inputs)}, not {', '.join(feeds) or 'nothing'}")
        lengths: dict[str, int] = {}
        for name, port in self._inputs.items():
            array = feeds[name]
            expected = _DTYPES[port.type]
            if array.dtype != expected:
                raise ValueError(f"{name} is {array.dtype}, {self._path} takes {np.dtype(expected)}")
            # A symbol stands for one value in all inputs.
            if len(array.shape) != len(port.shape) or not all(
                actual == size if isinstance(size, int) else size is None or lengths.setdefault(size, actual) == actual
                for actual, size in zip(array.shape, port.shape, strict=True)
            ):
                bound = ", ".join(f"{symbol} = {value}" for symbol, value in lengths.items()) or "static"
                raise ValueError(f"{name} is {list(array.shape)}, {self._path} takes {port.shape} ({bound})")


def cuda_problem() -> str | None:
    """Return why ONNX Runtime cannot use CUDA here and what to do, or None, and then its libraries are loaded."""
    if _CUDA in ort.get_available_providers():
        try:
            cuda_device()
        except BackendError as error:
            # Asked first: ONNX Runtime says on standard error what it lacks, and goes on.
            return f"{error} It comes from NVIDIA or with the system, not with pip; everything else is there."
        with contextlib.redirect_stdout(io.StringIO()) as said:
            ort.preload_dlls()
        note("onnxruntime", said.getvalue().splitlines())
        return None
    here, gpu = version_of("onnxruntime"), version_of("onnxruntime-gpu")
    if "absent" not in (here, gpu):
        return (
            f"onnxruntime {here}, for the CPU, lies over onnxruntime-gpu {gpu}: both are the module `onnxruntime`. "
            "Take both away and put one back: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install "
            f"'onnxruntime-gpu[cuda,cudnn]=={gpu}'."
        )
    return (
        f"ONNX Runtime {ort.__version__} is built for the CPU. Install the one with CUDA into an environment of its "
        "own: pip install 'sa3-convert[cuda]'."
    )


@functools.cache
def integer_products_saturate() -> bool:
    """Whether ONNX Runtime adds products of bytes in 16 bits here, as it does on x86 without VNNI.

    Its results are then wrong without a word, unless it is told to take kernels that are slower and exact.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(_BYTES_PRODUCT, options, providers=["CPUExecutionProvider"])
    a, b = np.full((2, 8), 255, np.uint8), np.full((8, 16), 127, np.int8)
    (found,) = session.run(None, {"a": a, "b": b})
    return bool((found != a.astype(np.int32) @ b).any())


def _refuse_without_memory(path: Path, error: Exception, size: int = 0) -> None:
    """Raise BackendError, with numbers, if what ONNX Runtime says is that the memory does not suffice."""
    text = str(error)
    if not re.search(r"out of memory|Failed to allocate|bad allocation|bad_alloc", text, re.IGNORECASE):
        return
    asked = re.search(r"requested bytes of (\d+)|buffer of size (\d+)", text)
    needed = max(size, *(int(number or 0) for number in asked.groups())) if asked else size
    wanted = f"{-(-needed // 2**20)} MiB at once" if needed else "more memory than there is"
    raise BackendError(
        f"{path} needs {wanted}; {gpu_state()}. Generate less at a time, end what else uses the GPU, or use "
        "--device cpu."
    ) from None


def _load(path: Path, threads: int | None, optimise: bool, device: str) -> ort.InferenceSession:
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        if problem := cuda_problem():
            raise BackendError(f"ONNX Runtime has no CUDA here: {problem} Or use --device cpu.")
        providers.insert(0, (_CUDA, _CUDA_OPTIONS))
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_ENABLE_BASIC
    # Every failure arrives as an exception; warnings can only be printed.
    options.log_severity_level = 2 if is_shown() else 4
    # Activations are returned to the system after each run: lengths differ, and several models are loaded in turn.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Idle threads that spin would take the processor from whichever runtime is compared with this one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimise and integer_products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    try:
        with working_on(named(path)):
            session = ort.InferenceSession(str(path), options, providers=providers)
    except _FAILURES as error:
        _refuse_without_memory(
            named(path), error, sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
        )
        raise ModelFileError(
            f"{named(path)} is not a model that ONNX Runtime can load (is its .data file beside it, and whole?): "
            + str(error).replace(str(path), str(named(path)))
        ) from None
    # ONNX Runtime itself goes on without a provider that does not start.
    if device == "cuda" and _CUDA not in session.get_providers():
        built = getattr(ort, "cuda_version", None) or "a CUDA that it does not name"
        raise BackendError(
            f"ONNX Runtime {ort.__version__} was built for CUDA {built} and cuDNN 9, and did not start with it for "
            f"{named(path)}: a library of these, or the NVIDIA driver, is missing or of another version (--verbose "
            f"says which; {gpu_state()}). Use a newer driver, an environment made with "
            "pip install 'sa3-convert[cuda]', or --device cpu."
        )
    return session
