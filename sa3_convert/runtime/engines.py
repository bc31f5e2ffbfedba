"""What runs the models: MNN, ONNX Runtime or torch, behind one small interface. Each is imported when it is used."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np

from sa3_convert.arrays import Session
from sa3_convert.bundle.manifest import SLOTS_OF, SPLIT_KINDS, TOKENIZER, ArtifactKind
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.config import TEXT_ENCODER_FOLDER
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import Component, contract
from sa3_convert.errors import BackendError, BundleError, CheckpointError, UsageError
from sa3_convert.runtime.autoencode import Bottleneck
from sa3_convert.runtime.noise import TorchGenerator
from sa3_convert.runtime.sampling import Noise
from sa3_convert.runtime.sessions import HeldSession, SplitSession
from sa3_convert.system.checked_files import CheckedFile, named
from sa3_convert.system.machine import default_threads

if TYPE_CHECKING:
    from torch import nn

    from sa3_convert.checkpoint.reader import Checkpoint
    from sa3_convert.mnn.session import MnnSession

EngineName = Literal["mnn", "onnxruntime", "onnxruntime-int8", "onnxruntime-fp16", "torch"]
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

    def noise(self, seed: int, draws: int) -> Noise:
        """Return the stream of noise of a seed, where the models work; as many are likely to be drawn."""
        ...

    def load(self, component: Component) -> Session:
        """Load a model.

        Raises:
            BundleError: there is no such model.
            ModelFileError: its file is missing or damaged.
            BackendError: the engine or the backend is not there.

        """
        ...


class OnHost:
    """An engine whose arrays are in the processor's memory."""

    def noise(self, seed: int, draws: int) -> Noise:
        """Return the stream of noise of a seed; see `Engine.noise`."""
        return TorchGenerator(seed).randn


@dataclass(frozen=True)
class MnnEngine(OnHost):
    """Runs `.mnn` files."""

    layout: CheckpointLayout
    files: Mapping[Component, CheckedFile]
    """Of a component in parts, the last."""
    threads: int | None = None
    """None is one per usable core."""
    memory: Level = "normal"
    """`normal` unpacks quantised weights; `low` keeps them as they are stored, for less memory and more error."""
    precision: Level = "high"
    """`low` is for components that are right in half arithmetic, and for the last of the parts; others get `normal`."""
    right_at_low: Collection[Component] = ()
    never_low: Collection[Component] = ()
    """Components that a probe found wrong at precision low here."""
    backend: Backend = "cpu"
    places: Mapping[Component, Backend] = field(default_factory=dict)
    """Components that run elsewhere than on `backend`."""
    parts: tuple[CheckedFile, ...] | None = None
    """The DiT in parts, to be run instead of the whole; see `passes.split`."""
    rank: int | None = None
    """Of the slots for adapters that the models have."""
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
        settings |= {f"{component.value} at": "normal" for component in self.raised}
        return settings if self.parts is None else settings | {"dit": "split"}

    @property
    def raised(self) -> tuple[Component, ...]:
        """Components that get another precision than `low`, which was asked for."""
        if self.precision != "low":
            return ()
        return tuple(c for c in self.files if c not in self.right_at_low or c in self.never_low)

    def load(self, component: Component) -> Session:
        """Load a model; see `Engine.load`."""
        ports = contract(component, self.layout, self.rank)
        level: Level = "normal" if component in self.raised else self.precision
        if component is Component.DIT and self.parts is not None:
            *early, last = self.parts
            # What decides phases and conditions, and is small: its precision is never low.
            before: Level = "normal" if level == "low" else level
            sessions = [self._session(component, part, before) for part in early]
            return HeldSession(SplitSession(*sessions, self._session(component, last, level)), self.parts, ports)
        file = _file(self.files, component, "MNN")
        names = {"inputs": [port.name for port in ports.inputs], "outputs": [port.name for port in ports.outputs]}
        return HeldSession(self._session(component, file, level, **names), (file,), ports)

    def _session(self, component: Component, file: CheckedFile, precision: Level, **names: list[str]) -> "MnnSession":
        from sa3_convert.mnn.session import MnnSession

        session = MnnSession(
            file.path,
            **names,
            threads=self.threads or default_threads(),
            memory=self.memory,
            precision=precision,
            backend=self.places.get(component, self.backend),
        )
        if session.weight_file_bytes and file.companion is None:
            session.close()
            raise BundleError(f"{named(file.path)} keeps weights in a file that the manifest does not list.")
        return session


@dataclass(frozen=True)
class OrtEngine(OnHost):
    """Runs ONNX files: the reference as exported, other forms with all of ONNX Runtime's optimisations."""

    layout: CheckpointLayout
    files: Mapping[Component, CheckedFile]
    threads: int | None = None
    """None is one per usable core."""
    backend: Literal["cpu", "cuda"] = "cpu"
    parts: tuple[CheckedFile, ...] = ()
    """The DiT in parts, where its files have them: what its conditions decide is computed once for all steps."""
    name: EngineName = "onnxruntime"
    rank: int | None = None
    """Of the slots for adapters that the models have."""

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
        files = self.parts if component is Component.DIT and self.parts else (file,)
        how = {"optimise": self.name != "onnxruntime", "device": self.backend}
        paths, threads = [one.path for one in files], self.threads or default_threads()
        session = SplitSession.opened(OrtSession, paths, threads=threads, **how)
        return HeldSession(session, files, contract(component, self.layout, self.rank))


@dataclass(frozen=True)
class TorchEngine:
    """Runs the networks themselves: in float32 the reference."""

    checkpoint: "Checkpoint"
    padding: Padding = "key_mask"
    """`value_zeroing` is what the published code computes without flash attention."""
    threads: int | None = None
    """None is one per usable core; it counts for the whole process."""
    backend: Literal["cpu", "cuda"] = "cpu"
    precision: Level = "high"
    """`normal` computes products in halves, but for the text encoder: what its gates let through has no bound."""
    rank: int | None = None
    """Of slots for adapters, with which networks are built."""
    name: EngineName = field(default="torch", init=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What models really run with, for reports."""
        return {
            "engine": self.name,
            "backend": self.backend,
            "threads": self.threads or default_threads(),
            "padding": self.padding,
            "precision": self.precision,
        }

    def noise(self, seed: int, draws: int) -> Noise:
        """Return torch's own stream of a seed; see `Engine.noise`."""
        from sa3_convert.networks.session import DeviceNoise

        return DeviceNoise(seed, self.backend, draws)

    def load(self, component: Component) -> Session:
        """Build a network; see `Engine.load`."""
        try:
            import torch

            from sa3_convert.networks.fast import accelerate
            from sa3_convert.networks.session import TorchSession
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
        ports = contract(component, self.checkpoint.layout, self.rank)
        network = self.network(component)
        accelerate(network, half=self.precision == "normal" and component is not Component.TEXT_ENCODER)
        return TorchSession(network, [port.name for port in ports.inputs], ports.outputs[0].name, self.backend)

    def network(self, component: Component) -> "nn.Module":
        """Build a network with the checkpoint's weights in it."""
        from sa3_convert.networks.build import build_network

        checkpoint = self.checkpoint
        state = checkpoint.state(component)
        return build_network(component, checkpoint.layout, state, padding=self.padding, rank=self.rank)


def _file(files: Mapping[Component, CheckedFile], component: Component, kind: str) -> CheckedFile:
    if component not in files:
        raise BundleError(
            f"There is no {kind} model of component {component.value!r} in this bundle, and this request needs it. "
            f"Convert again with --component {component.value}."
        )
    return files[component]


KINDS: Mapping[EngineName, ArtifactKind] = {
    "mnn": "mnn",
    "onnxruntime": "onnx",
    "onnxruntime-int8": "onnx-int8",
    "onnxruntime-fp16": "onnx-fp16",
}
MADE_BY: Mapping[EngineName, str] = {
    "onnxruntime-int8": "--with-ort-int8",
    "onnxruntime-fp16": "--with-onnx fp16",
}
ENGINE_OPTIONS: Mapping[EngineName, tuple[str, ...]] = {
    "mnn": ("threads", "memory", "precision", "never_low", "backend", "places", "split"),
    "onnxruntime": ("threads", "backend"),
    "onnxruntime-int8": ("threads", "backend"),
    "onnxruntime-fp16": ("threads", "backend"),
    "torch": ("threads", "padding", "precision", "backend", "checkpoint", "loras"),
}

_NO_SLOTS_IN_PARTS = "The DiT in parts takes no adapters. Leave --split-dit away, or merge them with `convert --lora`."


def kinds_of(name: EngineName, *, split: bool = False, adapters: bool = False) -> set[ArtifactKind]:
    """Return the kinds of files that an engine opens in a bundle; adapters of some types need the plain weights.

    UsageError if the DiT in parts shall take adapters.
    """
    if split and adapters:
        raise UsageError(_NO_SLOTS_IN_PARTS)
    kind = KINDS.get(name)
    if kind is None:
        return {"tokenizer"}
    return {kind, *(SPLIT_KINDS if split else ()), *((SLOTS_OF[kind], KINDS["mnn"]) if adapters else ())}


def takers(bundle: Bundle) -> list[EngineName]:
    """Return the engines whose models in a bundle take adapters."""
    return [name for name in KINDS if kinds_of(name, adapters=True) <= bundle.model_kinds]


def without_slots(bundle: Bundle, name: EngineName | None = None) -> BundleError:
    """Return the error of a bundle whose models take no adapters, or not those of an engine; it says what to do."""
    able = takers(bundle)
    where = f" on {name}" if name else ""
    instead = f"Use --engine {' or '.join(able)}, convert" if able else "Convert"
    made = " ".join(filter(None, ("--adapter-slots 16", MADE_BY.get(name) if name else None)))
    return BundleError(
        f"Bundle {bundle.path} has no models that take adapters{where}. {instead} again with {made}, or merge them "
        "with `convert --lora`."
    )


def bundle_engine(
    bundle: Bundle, name: EngineName, options: Mapping[str, Any], *, check: bool = True, rank: int | None = None
) -> Engine:
    """Return an engine over the files of a bundle.

    Args:
        bundle: an open bundle.
        name: one of `EngineName`; "torch" runs the checkpoint that the bundle was made from.
        options: keyword arguments of the engine; of torch also `checkpoint`, the folder, and `loras`, each as
            FILE[:STRENGTH].
        check: compare the files with the manifest first, once per open bundle; without it they still have to stay
            what they are from now on.
        rank: of the slots for adapters that its models shall have, where adapters change them; None is without.

    Raises:
        UsageError: no such engine, an option that it does not have, parts with slots, or torch without a checkpoint.
        BundleError: files are missing or are not what the manifest says.
        CheckpointError: the checkpoint is incomplete, damaged, or not the one that the bundle was made from.
        BackendError: torch is not installed.

    """
    if name not in get_args(EngineName):
        raise UsageError(f"There is no engine {name!r}. There are: {', '.join(get_args(EngineName))}.")
    if unknown := sorted(set(options) - set(ENGINE_OPTIONS[name])):
        raise UsageError(f"Engine {name} has no option {unknown[0]!r}. It has: {', '.join(ENGINE_OPTIONS[name])}.")
    if name == "torch":
        return replace(_torch_engine(bundle, options, check=check), rank=rank)
    settings = dict(options)
    if (split := settings.pop("split", False)) and rank is not None:
        raise UsageError(_NO_SLOTS_IN_PARTS)
    models = bundle.manifest.models(KINDS[name], split=split, slots=rank is not None)
    if split and SPLIT_KINDS[-1] not in {part.kind for part in models[Component.DIT]}:
        raise BundleError(f"Bundle {bundle.path} has no DiT in parts. Convert again with --with-split-dit.")
    if check:
        bundle.check((), kinds=())
    opened = {c: tuple(bundle.checked(c, one.kind, contents=check) for one in own) for c, own in models.items()}
    files = {component: own[-1] for component, own in opened.items()}
    if name == "mnn":
        parts = opened[Component.DIT] if split else None
        right_at_low = frozenset(c for c, own in models.items() if own[-1].lowest_precision == "low")
        return MnnEngine(bundle.layout, files, parts=parts, right_at_low=right_at_low, rank=rank, **settings)
    if name in MADE_BY and not files:
        raise BundleError(
            f"Bundle {bundle.path} has nothing for the engine {name}. Convert again with {MADE_BY[name]}."
        )
    dit = models.get(Component.DIT, ())
    parts = tuple(part for one in dit for part in bundle.checked_parts(Component.DIT, one.kind, contents=check))
    return OrtEngine(bundle.layout, files, parts=parts, name=name, rank=rank, **settings)


def _torch_engine(bundle: Bundle, options: Mapping[str, Any], *, check: bool) -> TorchEngine:
    settings = dict(options)
    folder = settings.pop("checkpoint", None)
    if folder is None:
        raise UsageError("Engine torch runs the checkpoint that the bundle was made from: say where it stands.")
    engine, _, _ = checkpoint_parts(Path(folder), settings)
    if replace(engine.checkpoint.layout, source_id=None) != replace(bundle.layout, source_id=None):
        raise CheckpointError(f"{folder} has other dimensions than {bundle.path} was made from.")
    if check:
        bundle.check((), kinds=())
        for component in bundle.components:
            if engine.checkpoint.digest(component) != bundle.manifest.checkpoint.digests.get(component):
                loras = ", ".join(f"{lora.name}:{lora.strength:g}" for lora in bundle.manifest.loras)
                raise CheckpointError(
                    f"The {component.value} of {folder} is not the one that {bundle.path} was made from. Give that "
                    f"bundle's own checkpoint, and its LoRAs with --lora ({loras or 'it has none'})."
                )
    return engine


def checkpoint_parts(folder: Path, options: Mapping[str, Any]) -> tuple[TorchEngine, Path, Bottleneck]:
    """Return torch engine, tokenizer and bottleneck of a checkpoint folder."""
    try:
        from sa3_convert.checkpoint.lora_file import LoraRequest
        from sa3_convert.checkpoint.reader import Checkpoint
    except ImportError as error:
        raise BackendError(f"torch cannot be imported ({error}). Install it: pip install torch.") from None

    settings = dict(options)
    loras = [LoraRequest.parse(text) for text in settings.pop("loras", ())]
    checkpoint = Checkpoint.open(folder).with_loras(loras)
    state = checkpoint.state(Component.DECODER)
    bottleneck = Bottleneck(
        scaling_factor=state["bottleneck.scaling_factor"].numpy().copy(),
        bias=state["bottleneck.bias"].numpy().copy(),
        running_std=np.float32(state["bottleneck.running_std"].item()),
    )
    return TorchEngine(checkpoint, **settings), folder / TEXT_ENCODER_FOLDER / TOKENIZER, bottleneck
