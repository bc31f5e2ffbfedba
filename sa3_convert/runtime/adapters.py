"""Adapters at run time: published LoRA files composed into what a model with slots takes, with nothing but NumPy.

A layer's weight W with all adapters in it, applied one after the other as `checkpoint.lora` merges them, is

    V = diag(r) · W · diag(c) + B · A

for every type: a low-rank step adds columns to B and rows to A; magnitudes of rows multiply r and B, those of columns c
and A. Magnitudes need the norms of V, and so W itself: it is read from the bundle's own stored model.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays, Doubles, Floats, Session, constant
from sa3_convert.bundle.manifest import SLOTS_OF
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.checkpoint.lora import merged, singular_bases
from sa3_convert.checkpoint.lora_file import LoraFile, bind, read_lora
from sa3_convert.checkpoint.lora_names import lora_state
from sa3_convert.checkpoint.tensors import expected_tensors
from sa3_convert.checkpoint.variants import name_of
from sa3_convert.components import ADAPTED, SPECS, Component, Slot, slot_sizes, slots
from sa3_convert.errors import BundleError, LoraError
from sa3_convert.runtime.engines import KINDS, EngineName, TorchEngine, bundle_engine, without_slots
from sa3_convert.runtime.models import KeepLoaded, Models
from sa3_convert.runtime.setting_values import AdapterRequest
from sa3_convert.system.checked_files import FileState

LEAST_DB: Final = 20.0
"""Of the step that adapters make together: what compressing it into the slots must leave at least."""
_NORM_EPS: Final = np.float32(1e-12)
RANK_OF_NETWORKS: Final = 64
"""Of slots that networks are built with, where no file decides it."""
_KEPT: Final = 4
"""Compositions that stay ready: a generation with two intervals has up to three."""
_OPENED: Final = 8
"""Files whose factors stay in memory, unless one generation takes more."""

Weights = Callable[[Component, str], Floats]
"""(component, layer) → its weight [out, in], as the bundle stores it."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """An adapter that fits the model, with its factors as they are used."""

    file: LoraFile
    layers: dict[tuple[Component, str], str]
    """Its own name of a layer."""
    factors: dict[str, dict[str, Floats]] = field(default_factory=dict)

    def of(self, layer: str) -> dict[str, Floats]:
        if layer not in self.factors:
            stored = self.file.layers[layer]
            self.factors[layer] = {factor: self.file.tensors.array(name) for factor, name in stored.items()}
        return self.factors[layer]


@dataclass(slots=True)
class _Weight:
    """V as a model with slots computes it.

    In float64, and rounded when it is written: products of float32 end in other bits with another number of threads.
    """

    slot: Slot
    rows: Doubles
    columns: Doubles
    outer: Doubles
    """B [out, k]."""
    inner: Doubles
    """A [k, in]."""

    @classmethod
    def plain(cls, slot: Slot) -> "_Weight":
        fan_out, fan_in = slot.fan_out, slot.fan_in
        return cls(slot, np.ones(fan_out), np.ones(fan_in), np.empty((fan_out, 0)), np.empty((0, fan_in)))

    def apply(self, adapter: _Opened, layer: str, strength: float, weight: Callable[[], Floats]) -> None:
        """Apply an adapter, which calls the layer so, after those before it."""
        lora, factors = adapter.file, adapter.of(layer)
        kind, scale = lora.type, lora.scale(layer, strength)
        outer: Doubles | Floats
        if not kind.bases_of_weight:
            outer, inner = factors["lora_B"], factors["lora_A"]
        else:
            left, right = (factors["U"], factors["V"]) if "U" in factors else singular_bases(weight(), lora.rank)
            outer, inner = left.astype(np.float64) @ factors["M_xs"], right.T
        self.outer = np.concatenate((self.outer, outer * scale), axis=1)
        self.inner = np.concatenate((self.inner, inner))
        if kind.rows is not None:
            factor = factors[kind.rows].ravel() / (np.linalg.norm(self._whole(weight), axis=1) + _NORM_EPS)
            self.rows, self.outer = self.rows * factor, self.outer * factor[:, np.newaxis]
        if kind.columns is not None:
            factor = factors[kind.columns].ravel() / (np.linalg.norm(self._whole(weight), axis=0) + _NORM_EPS)
            self.columns, self.inner = self.columns * factor, self.inner * factor

    def _whole(self, weight: Callable[[], Floats]) -> Doubles:
        whole: Doubles = weight() * self.columns
        whole *= self.rows[:, np.newaxis]
        whole += self.outer @ self.inner
        return whole

    def compress(self, rank: int) -> tuple[float, float]:
        """Keep the largest singular values of B·A; return the energy of all, and of those that are lost."""
        if self.outer.shape[1] <= rank:
            return 0.0, 0.0
        (left, first), (right, second) = np.linalg.qr(self.outer), np.linalg.qr(self.inner.T)
        u, values, v = np.linalg.svd(first @ second.T, full_matrices=False)
        root = np.sqrt(values[:rank])
        self.outer, self.inner = left @ (u[:, :rank] * root), (right @ (v[:rank].T * root)).T
        energies = values**2
        return float(energies.sum()), float(energies[rank:].sum())

    def write(self, rank: int, inner: Floats, outer: Floats) -> None:
        """Write this layer's part of the two inputs, which hold zeros."""
        slot, k = self.slot, self.outer.shape[1]
        part = inner[slot.inner * (rank + 1) :]
        part[: slot.fan_in] = self.columns - 1
        part[slot.fan_in : slot.fan_in * (rank + 1)].reshape(slot.fan_in, rank)[:, :k] = self.inner.T
        part = outer[slot.outer * (rank + 1) :]
        part[: slot.fan_out] = self.rows - 1
        part[slot.fan_out : slot.fan_out * (rank + 1)].reshape(rank, slot.fan_out)[:k] = self.outer.T


@dataclass(frozen=True, slots=True)
class Composed:
    """What a model with slots takes for some adapters."""

    feeds: Arrays
    compressed_db: float = math.inf
    """Ratio of the step that all of them make together to what the slots' rank has lost of it."""


class Adapters:
    """Reads adapter files and composes them for the slots of one model.

    Args:
        layout: of the model.
        rank: of its slots.
        weights: gives the weights that magnitudes and singular bases are computed of.
        of_merged: whether there are LoRAs in these weights already; singular bases are of those without any.

    """

    def __init__(self, layout: CheckpointLayout, rank: int, weights: Weights, *, of_merged: bool = False) -> None:
        self._layout, self._rank, self._weights, self._of_merged = layout, rank, weights, of_merged
        self._opened: dict[Path, tuple[tuple[FileState | None, ...], _Opened]] = {}
        self._composed: dict[tuple[Component, tuple[tuple[str, float], ...]], Composed] = {}

    @classmethod
    def of_bundle(cls, bundle: Bundle, rank: int) -> "Adapters":
        """Return what composes for the slots of a bundle's models."""
        return cls(bundle.layout, rank, stored_weights(bundle), of_merged=bool(bundle.manifest.loras))

    def open(self, requests: Iterable[AdapterRequest]) -> None:
        """Open files, and hold them to the model; let go of others that were not used lately.

        Raises:
            LoraError: a file is not an adapter for this model; the message says why.
            CheckpointError: a file is missing or damaged.

        """
        paths = {request.path for request in requests}
        for path in paths:
            self._open(path)
        for old in list(self._opened)[: -max(len(paths), _OPENED)]:
            del self._opened[old]

    def told(self, requests: Iterable[AdapterRequest]) -> list[dict[str, str]]:
        """Return what audio files tell about adapters beside their settings: which bytes their names stood for."""
        return [{"name": one.path.name, "sha256": self._open(one.path).file.sha256} for one in requests]

    def _open(self, path: Path) -> _Opened:
        known, state = self._opened.pop(path, None), lora_state(path)
        if known is None or state != known[0]:
            file = read_lora(path)
            without = [names for names in file.layers.values() if "U" not in names]
            if self._of_merged and file.type.bases_of_weight and without:
                raise LoraError(
                    f"{path} is of the type {file.type_name} without its bases, which are those of the weights before "
                    "any LoRA was merged into them; here some were. Merge it too, or take weights without."
                )
            shapes = {name: spec.shape for name, spec in expected_tensors(self._layout).items()}
            layers = {}
            for name, layer in bind(file, shapes, name_of(self._layout)).items():
                component = next(one for one in ADAPTED if name.startswith(SPECS[one].weights))
                (prefix,) = SPECS[component].weights
                layers[component, name.removeprefix(prefix).removesuffix(".weight")] = layer
            # The state before: what was written while the file was read shows the next time.
            known = state, _Opened(file, layers)
        self._opened[path] = known
        return known[1]

    def composed(self, component: Component, requests: Sequence[AdapterRequest]) -> Composed:
        """Return what a component takes for adapters, in the order in which they are applied.

        Raises:
            LoraError: the rank of all is above the slots', and compressed to it too much would be lost; or a number is
                not finite.

        """
        active = [(self._open(request.path), request.strength) for request in requests if request.strength]
        key = component, tuple((adapter.file.sha256, strength) for adapter, strength in active)
        if key not in self._composed:
            made = self._compose(component, active)
            for old in list(self._composed)[: max(0, len(self._composed) - _KEPT + 1)]:
                del self._composed[old]
            self._composed[key] = made
        return self._composed[key]

    def _compose(self, component: Component, active: Sequence[tuple[_Opened, float]]) -> Composed:
        feeds = {
            name: np.zeros(size, np.float32) for name, size in slot_sizes(component, self._layout, self._rank).items()
        }
        inner, outer = feeds.values()
        whole = lost = 0.0
        for slot in slots(component, self._layout):
            changes = [(one, strength, one.layers.get((component, slot.layer))) for one, strength in active]
            if not any(layer is not None for *_, layer in changes):
                continue
            weight, stored = _Weight.plain(slot), cache(lambda layer=slot.layer: self._weights(component, layer))
            with np.errstate(all="ignore"):
                for adapter, strength, layer in changes:
                    if layer is not None:
                        weight.apply(adapter, layer, strength, stored)
                self._require_finite(weight, active)
                energies = weight.compress(self._rank)
            whole, lost = whole + energies[0], lost + energies[1]
            weight.write(self._rank, inner, outer)
        db = 10 * math.log10(whole / lost) if lost else math.inf
        if db < LEAST_DB:
            raise LoraError(
                f"Together {_names(active)} have a rank above that of the bundle's slots, {self._rank}; compressed to "
                f"it they would keep {db:.1f} dB, and at least {LEAST_DB:g} are needed. Use fewer at a time, convert "
                "again with a larger --adapter-slots, or merge them with `convert --lora`."
            )
        return Composed({name: constant(array) for name, array in feeds.items()}, db)

    def _require_finite(self, weight: _Weight, active: Sequence[tuple[_Opened, float]]) -> None:
        parts = (weight.rows, weight.columns, weight.outer, weight.inner)
        if not all(np.isfinite(part.astype(np.float32)).all() for part in parts):
            raise LoraError(f"{weight.slot.layer} is not finite with {_names(active)}.")


def _names(active: Sequence[tuple[_Opened, float]]) -> str:
    return " and ".join(f"{adapter.file.path}:{strength:g}" for adapter, strength in active)


def stored_weights(bundle: Bundle) -> Weights:
    """Return what reads the weights of a bundle's plain models for MNN, as MNN itself does."""
    from sa3_convert.mnn.file.dequantise import dequantised_weight
    from sa3_convert.mnn.file.storage import read_storage
    from sa3_convert.mnn.layer_rules import LIFTED_SUFFIX, layer_name

    files = cache(lambda component: bundle.checked(component))
    storages = cache(lambda component: read_storage(files(component).path))

    def weight(component: Component, layer: str) -> Floats:
        storage = storages(component)
        named = next((op.name for op, _ in storage.weighted() if layer_name(op.name) == layer), None)
        if named is None:
            raise BundleError(f"{bundle.file(component)} has no layer {layer}. Convert again.")
        if LIFTED_SUFFIX in named:
            raise BundleError(
                f"{bundle.file(component)} stores {layer} with small channels magnified, its norms are others; merge "
                "adapters of this type with `convert --lora`."
            )
        found = dequantised_weight(storage.path, named, storage=storage)
        files(component).require_unchanged()
        return found.reshape(found.shape[0], -1)

    return weight


def rank_of(bundle: Bundle, name: EngineName) -> int:
    """Return the rank of the slots for adapters that an engine's models in a bundle have.

    Raises:
        BundleError: it has none of its own.

    """
    if name == "torch":
        return RANK_OF_NETWORKS
    kind = SLOTS_OF[KINDS[name]]
    found = {a.component: a.rank for a in bundle.manifest.artifacts if a.kind == kind and a.rank is not None}
    ranks = set(found.values())
    if len(ranks) != 1 or not found.keys() >= set(ADAPTED):
        raise without_slots(bundle, name)
    return ranks.pop()


class Slotted:
    """Models with slots, and what they run with.

    Args:
        models: those with slots.
        adapters: composes for them.

    """

    def __init__(self, models: Models, adapters: Adapters) -> None:
        self.models, self.adapters = models, adapters

    def prepare(self, requests: Sequence[AdapterRequest], levels: Sequence[float]) -> list[str]:
        """Open and compose adapters for these noise levels, at which the DiT is run; return what is to be told.

        Raises:
            LoraError: a file is no adapter for this model, or they cannot be applied together.
            CheckpointError: a file is missing or damaged.

        """
        self.adapters.open(requests)
        kept = {tuple(_active(requests, level)): math.inf for level in levels}
        first = next(iter(kept))
        for component, one in ((Component.NUMBER_CONDITIONER, first), *((Component.DIT, one) for one in kept)):
            kept[one] = min(kept[one], self.adapters.composed(component, one).compressed_db)
        idle = [one for one in requests if not any(one in active for active in kept)]
        return [f"{one} has no effect: no step is at one of its noise levels." for one in idle] + [
            f"{' and '.join(map(str, one))} have a higher rank than the slots; compressed to it they keep {db:.1f} dB."
            for one, db in kept.items()
            if db != math.inf
        ]

    @contextlib.contextmanager
    def use(self, component: Component, requests: Sequence[AdapterRequest], level: float) -> Iterator[Session]:
        """Yield a loaded model with adapters, a whole one at a level, the DiT in each run at that of its time."""
        with self.models.use(component) as session:
            yield _AdaptedSession(session, lambda t: self.adapters.composed(component, _active(requests, t)), level)


def _active(requests: Sequence[AdapterRequest], level: float) -> list[AdapterRequest]:
    at = np.float32(level)  # what steps are told by: a bound that names a step's level holds it
    return [request for request in requests if np.float32(request.low) <= at <= np.float32(request.high)]


@dataclass(frozen=True, slots=True)
class _AdaptedSession:
    session: Session
    composed: Callable[[float], Composed]
    level: float

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        level = float(feeds["t"][0]) if "t" in feeds else self.level
        return self.session.run({**feeds, **self.composed(level).feeds})


def slotted_models(
    bundle: Bundle, engine: EngineName, options: dict[str, Any], *, check: bool, keep_loaded: KeepLoaded
) -> Slotted:
    """Return the models of a bundle that take adapters; see `bundle_engine` for arguments and errors."""
    rank = rank_of(bundle, engine)
    runner = bundle_engine(bundle, engine, options, check=check, rank=rank)
    if isinstance(runner, TorchEngine):
        return slotted_networks(runner, keep_loaded=keep_loaded)
    return Slotted(Models(runner, keep_loaded=keep_loaded), Adapters.of_bundle(bundle, rank))


def slotted_networks(engine: TorchEngine, *, keep_loaded: KeepLoaded) -> Slotted:
    """Return the networks of a checkpoint with slots; magnitudes are of its own weights, as in merging."""
    checkpoint = engine.checkpoint

    def weight(component: Component, layer: str) -> Floats:
        (prefix,) = SPECS[component].weights
        name = f"{prefix}{layer}.weight"
        found: Floats = merged(name, checkpoint.weights.tensors({name: name})[name], checkpoint.loras).numpy()
        return found.reshape(found.shape[0], -1)

    models = Models(replace(engine, rank=RANK_OF_NETWORKS), keep_loaded=keep_loaded)
    adapters = Adapters(checkpoint.layout, RANK_OF_NETWORKS, weight, of_merged=bool(checkpoint.loras))
    return Slotted(models, adapters)
