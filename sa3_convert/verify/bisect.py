"""Find the first operator of a converted model whose error its inputs do not explain.

A tensor that keeps its name through conversion exists on both sides. For each one there are three values: the
reference's; the target's; and what the reference's operators make of the *target's* inputs. The last two differ only
by what the target's own operators did wrong, so an error is charged to the operator that makes it, however much error
it was handed and however much the operators after it amplify it.

Tensors that were fused away are crossed: the piece of graph between two comparable tensors is judged as one operator.
A name can also survive on another value (an activation that the converter moved in front of a reshape). Such a tensor
looks wrong while everything after it is right; it is told from a real fault by crossing it.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from sa3_convert.errors import VerificationError
from sa3_convert.mnn.backends import Backend
from sa3_convert.mnn.storage import read_storage
from sa3_convert.ort import OrtSession
from sa3_convert.session import Arrays
from sa3_convert.verify.bisect_result import BisectResult, OperatorError, limit_db
from sa3_convert.verify.bisect_walk import TargetRuns, Walk, matched, signal_to_noise
from sa3_convert.verify.reference_graph import ReferenceGraph
from sa3_convert.verify.target_graph import TargetGraph

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
