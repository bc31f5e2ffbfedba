"""What runs the models: MNN, ONNX Runtime or torch, behind one small interface. Each is imported when it is used."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays, Session
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import Component, contract
from sa3_convert.errors import BackendError, BundleError
from sa3_convert.runtime.sessions import HeldSession, SplitSession
from sa3_convert.system.checked_files import CheckedFile, named
from sa3_convert.system.machine import default_threads

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint
    from sa3_convert.mnn.session import MnnSession

EngineName = Literal["mnn", "onnxruntime", "onnxruntime-int8", "torch"]
Level = Literal["normal", "high", "low"]
Backend = Literal["cpu", "cuda", "opencl", "vulkan"]
Padding = Literal["key_mask", "value_zeroing"]


class Engine(Protocol):
    """Loads models. What it runs on is fixed when it is made, and never replaced by something else in silence."""

    @property
    def name(self) -> EngineName:
        """Its name."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What models really run with, for reports."""
        ...

    def load(self, component: Component) -> Session:
        """Load a model.

        Raises:
            BundleError: there is no such model.
            ModelFileError: its file is missing or damaged.
            BackendError: the engine or the backend is not there.

        """
        ...


@dataclass(frozen=True)
class MnnEngine:
    """Runs `.mnn` files."""

    layout: CheckpointLayout
    files: Mapping[Component, CheckedFile]
    threads: int | None = None
    """None is one per usable core."""
    memory: Level = "normal"
    """`normal` unpacks quantised weights; `low` keeps them as they are stored, for less memory and more error."""
    precision: Level = "high"
    backend: Backend = "cpu"
    places: Mapping[Component, Backend] = field(default_factory=dict)
    """Components that run elsewhere than on `backend`."""
    parts: tuple[CheckedFile, CheckedFile] | None = None
    """The DiT in two parts, to be run instead of the whole; see `passes.split`."""
    name: EngineName = field(default="mnn", init=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What models really run with, for reports."""
        settings = {
            "engine": self.name,
            "backend": self.backend,
            "threads": self.threads or default_threads(),
            "memory": self.memory,
            "precision": self.precision,
        } | {f"{component.value} on": place for component, place in self.places.items() if place != self.backend}
        return settings if self.parts is None else settings | {"dit": "split"}

    def load(self, component: Component) -> Session:
        """Load a model; see `Engine.load`."""
        if component is Component.DIT and self.parts is not None:
            prepare, step = (self._session(component, part) for part in self.parts)
            return HeldSession(SplitSession(prepare, step), self.parts, contract(component, self.layout))
        file = _file(self.files, component, "MNN")
        ports = contract(component, self.layout)
        session = self._session(
            component,
            file,
            inputs=[port.name for port in ports.inputs],
            outputs=[port.name for port in ports.outputs],
        )
        return HeldSession(session, (file,), ports)

    def _session(
        self,
        component: Component,
        file: CheckedFile,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> "MnnSession":
        from sa3_convert.mnn.session import MnnSession

        session = MnnSession(
            file.path,
            inputs=inputs,
            outputs=outputs,
            threads=self.threads or default_threads(),
            memory=self.memory,
            precision=self.precision,
            backend=self.places.get(component, self.backend),
        )
        if session.weight_file_bytes and file.companion is None:
            session.close()
            raise BundleError(f"{named(file.path)} keeps weights in a file that the manifest does not list.")
        return session


@dataclass(frozen=True)
class OrtEngine:
    """Runs ONNX files: as exported, or quantised and then with all of ONNX Runtime's optimisations."""

    layout: CheckpointLayout
    files: Mapping[Component, CheckedFile]
    threads: int | None = None
    """None is one per usable core."""
    quantised: bool = False
    backend: Literal["cpu", "cuda"] = "cpu"

    @property
    def name(self) -> EngineName:
        """Its name."""
        return "onnxruntime-int8" if self.quantised else "onnxruntime"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What models really run with, for reports."""
        return {"engine": self.name, "backend": self.backend, "threads": self.threads or default_threads()}

    def load(self, component: Component) -> Session:
        """Load a model; see `Engine.load`."""
        try:
            from sa3_convert.ort import OrtSession
        except ImportError as error:
            raise BackendError(
                f"ONNX Runtime cannot be imported ({error}). Install it: pip install onnxruntime, or use --engine mnn."
            ) from None

        file = _file(self.files, component, "ONNX")
        session = OrtSession(
            file.path, threads=self.threads or default_threads(), optimise=self.quantised, device=self.backend
        )
        return HeldSession(session, (file,), contract(component, self.layout))


@dataclass(frozen=True)
class TorchEngine:
    """Runs the networks themselves, in float32: the reference."""

    checkpoint: "Checkpoint"
    padding: Padding = "key_mask"
    """`value_zeroing` is what the published code computes without flash attention."""
    threads: int | None = None
    """None is one per usable core; it counts for the whole process."""
    backend: Literal["cpu", "cuda"] = "cpu"
    name: EngineName = field(default="torch", init=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What models really run with, for reports."""
        return {
            "engine": self.name,
            "backend": self.backend,
            "threads": self.threads or default_threads(),
            "padding": self.padding,
        }

    def load(self, component: Component) -> Session:
        """Build a network; see `Engine.load`."""
        try:
            import torch

            from sa3_convert.networks.build import build_network
        except ImportError as error:
            raise BackendError(
                f"torch cannot be imported ({error}). Install it: pip install torch, or use --engine mnn."
            ) from None

        if self.backend == "cuda" and not torch.cuda.is_available():
            raise BackendError(
                f"torch {torch.__version__} finds no CUDA device. Install a build with CUDA (pip install torch, from "
                "PyTorch's CUDA index) on a machine with an NVIDIA GPU and driver, or use --device cpu."
            )
        torch.set_num_threads(self.threads or default_threads())
        layout = self.checkpoint.layout
        ports = contract(component, layout)
        network = build_network(component, layout, self.checkpoint.state(component), padding=self.padding)
        return _TorchSession(
            network.to(self.backend), [port.name for port in ports.inputs], ports.outputs[0].name, self.backend
        )


class _TorchSession:
    def __init__(self, network: Any, inputs: list[str], output: str, device: str) -> None:
        self._network, self._device = network, device
        self._inputs = inputs
        self._output = output

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        import torch

        if feeds.keys() != set(self._inputs):
            raise ValueError(f"the network takes {', '.join(self._inputs)}, not {', '.join(feeds)}")
        with torch.inference_mode():
            arrays = (torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self._inputs)
            output = self._network(*(array.to(self._device) for array in arrays))
        return {self._output: output.cpu().numpy()}


def _file(files: Mapping[Component, CheckedFile], component: Component, kind: str) -> CheckedFile:
    if component not in files:
        raise BundleError(
            f"There is no {kind} model of component {component.value!r} in this bundle, and this request needs it. "
            f"Convert again with --component {component.value}."
        )
    return files[component]


class Models:
    """Loads models when they are needed and frees them after their stage, or keeps them.

    Args:
        engine: what loads them.
        keep_loaded: keep every model once it was loaded, for servers and batches.

    """

    def __init__(self, engine: Engine, *, keep_loaded: bool = False) -> None:
        self.engine = engine
        self._keep_loaded = keep_loaded
        self._kept: dict[Component, Session] = {}

    @contextlib.contextmanager
    def use(self, component: Component) -> Iterator[Session]:
        """Yield a loaded model; after the block it is freed unless models are kept."""
        session = self._kept.get(component)
        if session is None:
            session = self.engine.load(component)
        if self._keep_loaded:
            self._kept[component] = session
        try:
            yield session
        finally:
            if not self._keep_loaded:
                _free(session)

    def close(self) -> None:
        """Free what was kept."""
        while self._kept:
            _free(self._kept.popitem()[1])


def _free(session: Session) -> None:
    close = getattr(session, "close", None)
    if close is not None:
        close()
