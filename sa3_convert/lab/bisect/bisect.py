"""Find the first operator of a converted model whose error its inputs do not explain."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Arrays
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.inputs import sample_inputs
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import Component, Length, contract
from sa3_convert.errors import InputError, VerificationError
from sa3_convert.lab.bisect.graphs import ReferenceGraph, TargetGraph
from sa3_convert.lab.bisect.runtimes import Runtime, RuntimeComparison, bisect_against
from sa3_convert.lab.bisect.walk import (
    BisectResult,
    OperatorError,
    TargetRuns,
    Walk,
    limit_db,
    matched,
    signal_to_noise,
)
from sa3_convert.mnn.compatibility import Backend, require_backend
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.ort import OrtSession
from sa3_convert.system.untrusted import open_regular

_SHARPENED = 8
"""Places at which each crossed tensor is tried on its own; each costs a run of the target."""


def bisect(
    reference: Path,
    target: Path,
    feeds: Arrays,
    *,
    threads: int | None = None,
    memory_limit: int = 1 << 30,
    backend: Backend = "cpu",
) -> BisectResult:
    """Compare all intermediate tensors that reference and target have in common.

    Args:
        reference: the fp32 ONNX that `target` was made from.
        target: the `.mnn`.
        feeds: the inputs.
        threads: of either engine; None is one per processor.
        memory_limit: bytes of intermediate tensors that are kept at a time, per side; when they are more, the graph is
            gone through in several runs.
        backend: what MNN runs the target on.

    Raises:
        BackendError: the installed MNN does not have the backend.
        ModelFileError: a file is missing or damaged, or cannot be run with these feeds.
        VerificationError: the two have no tensor in common.

    """
    runs = TargetRuns(target, feeds, threads, backend)
    return _Bisection(reference, runs, feeds, threads, memory_limit).result()


class _Bisection:
    def __init__(
        self, reference: Path, runs: TargetRuns, feeds: Arrays, threads: int | None, memory_limit: int
    ) -> None:
        # Whole runs first: a file that is damaged or does not take these feeds fails here, with a message of its own.
        outputs = OrtSession(reference, threads=threads).run(feeds)
        self._runs = runs
        self._runs.outputs(list(outputs))
        self._graph = ReferenceGraph(reference, feeds, threads)
        self._stored = TargetGraph(read_storage(runs.path))
        self._feeds, self._memory_limit = feeds, memory_limit
        self._lost = {name for name in self._graph.tensors if name not in self._stored.tensors}

    def result(self) -> BisectResult:
        first = self._errors(lambda name: True)
        faulty = {e.name for e in first if e.is_faulty} - set(self._graph.outputs)
        if not faulty:
            return BisectResult(tuple(first), self._incomparable(set()))
        crossed = self._errors(lambda name: name not in faulty)
        renamed = faulty - self._real_faults(crossed, faulty)
        final = self._errors(lambda name: name not in renamed) if renamed else first
        return BisectResult(tuple(final), self._incomparable(renamed))

    def _incomparable(self, renamed: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self._graph.tensors if name in self._lost or name in renamed)

    def _errors(self, wanted: Callable[[str], bool]) -> list[OperatorError]:
        """Walk over the tensors that are wanted and not lost."""
        while True:
            comparable = [name for name in self._graph.tensors if name not in self._lost and wanted(name)]
            if not comparable:
                raise VerificationError("Reference and target have no tensor in common: nothing can be compared.")
            walk = Walk(self._graph, self._stored, self._feeds, self._runs, comparable)
            lost = walk.all(self._memory_limit)
            if not lost:
                return walk.errors
            # What follows a lost tensor reaches further back, so all is gone through again.
            self._lost |= lost

    def _real_faults(self, crossed: Sequence[OperatorError], suspects: Collection[str]) -> set[str]:
        """Return the suspects without which something after them is not explained either."""
        known = {error.name for error in crossed}
        real: set[str] = set()
        tries = 0
        for error in (e for e in crossed if e.is_faulty):
            operators, _ = self._graph.segment(error.name, known)
            inside = [name for name in suspects if self._graph.tensors[name].index in operators]
            inside = sorted((n for n in inside if n != error.name), key=lambda n: self._graph.tensors[n].index)
            if len(inside) > 1 and tries < _SHARPENED:
                tries += 1
                inside = self._first_that_explains(error, inside, known)
            real.update(inside)
        return real

    def _first_that_explains(self, error: OperatorError, inside: list[str], known: set[str]) -> list[str]:
        """Return the first of the crossed tensors whose value in the target explains `error`; all if none does."""
        for name in inside:
            given = known | {name}
            sources = self._graph.segment(error.name, given)[1]
            reference = self._graph.run([*sources, error.name], {}, self._feeds)
            values, lost = matched(reference, self._runs.available([*sources, error.name]))
            if lost:
                continue
            explained = self._graph.run([error.name], {s: values[s] for s in sources}, self._feeds)
            own = signal_to_noise(explained[error.name], values[error.name])
            if own is not None and own >= limit_db(error.stored):
                return [name]
        return inside


DEFAULT_LATENTS: Mapping[Component, int] = {
    Component.TEXT_ENCODER: 1,
    Component.NUMBER_CONDITIONER: 1,
    Component.DIT: 108,
    Component.DECODER: 16,
    Component.ENCODER: 16,
}


def bisect_bundle(
    bundle: Bundle,
    component: Component,
    *,
    seed: int = 0,
    latents: int | None = None,
    feeds: Arrays | None = None,
    threads: int | None = None,
    backend: Backend = "cpu",
) -> BisectResult:
    """Compare the intermediate tensors of a bundle's model with those of its reference.

    Args:
        bundle: its files are checked against its manifest first.
        component: which model.
        seed: of the sampled inputs; the cases of a verification name theirs.
        latents: T of the sampled inputs; None is a length that takes seconds.
        feeds: inputs to use instead of sampled ones; see `read_feeds`.
        threads: of either engine; None is one per processor.
        backend: what MNN runs the model on.

    Raises:
        BackendError: the installed MNN does not have the backend.
        BundleError: the bundle lacks the component, or a file is not what the manifest says.
        ModelFileError: a file cannot be loaded or run.
        VerificationError: the two have no tensor in common.

    """
    require_backend(backend)
    reference, target = bundle.checked(component, "onnx"), bundle.checked(component, "mnn")
    given = _sampled(bundle, component, seed, latents) if feeds is None else feeds
    found = bisect(reference.path, target.path, given, threads=threads, backend=backend)
    reference.require_unchanged()
    target.require_unchanged()
    return found


def bisect_bundle_against(
    bundle: Bundle,
    component: Component,
    target: Runtime,
    reference: Runtime,
    *,
    seed: int = 0,
    latents: int | None = None,
    feeds: Arrays | None = None,
) -> RuntimeComparison:
    """Compare the tensors of a bundle's model between two ways to run it; see `bisect_bundle` and `bisect_against`."""
    file = bundle.checked(component, "mnn")
    found = bisect_against(file.path, feeds or _sampled(bundle, component, seed, latents), target, reference)
    file.require_unchanged()
    return found


def _sampled(bundle: Bundle, component: Component, seed: int, latents: int | None) -> Arrays:
    return sample_inputs(component, bundle.layout, seed=seed, latents=latents or DEFAULT_LATENTS[component]).feeds


_LARGEST = 2 << 30
"""Bytes of inputs; the longest audio that a model takes has a tenth of them."""


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read a `.npz` file; one that is damaged or too large is an InputError."""
    try:
        with open_regular(path) as stream, ZipFile(stream) as members:
            if sum(member.file_size for member in members.infolist()) > _LARGEST:
                raise InputError(f"{path} holds more than {_LARGEST >> 20} MiB.")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except InputError:
        raise
    except Exception as error:  # what zipfile, zlib and numpy raise of damaged files has no type in common
        raise InputError(f"{path} is no .npz file of inputs: {error}") from None


def read_feeds(path: Path, component: Component, layout: CheckpointLayout) -> dict[str, NDArray[Any]]:
    """Read a component's inputs from a `.npz` file and hold them to the contract."""
    feeds = read_arrays(path)
    ports = contract(component, layout).inputs
    wanted = {port.name for port in ports}
    if feeds.keys() != wanted:
        raise InputError(f"{path} holds {', '.join(feeds) or 'nothing'}; {component.value} takes {', '.join(wanted)}.")
    lengths: set[int] = set()
    for port in ports:
        array = feeds[port.name]
        fits = array.ndim == len(port.shape) and str(array.dtype) == port.dtype and np.isfinite(array).all()
        for size, dimension in zip(array.shape, port.shape, strict=False):
            if isinstance(dimension, Length):
                fits &= size > 0 and size % dimension.factor == 0
                lengths.add(size // dimension.factor)
            else:
                fits &= size == dimension
        if not fits or len(lengths) > 1:
            shape = [f"{d.factor}·T" if isinstance(d, Length) else d for d in port.shape]
            raise InputError(
                f"{path}: {port.name} is {array.dtype} {list(array.shape)}; {component.value} takes {port.dtype} "
                f"{shape}, finite, with one T for all inputs."
            )
    return feeds
