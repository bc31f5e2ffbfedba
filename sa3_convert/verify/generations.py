"""A bundle's generations on both sides: which cases, and the sides and store that they need."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.components import Component
from sa3_convert.errors import BundleError
from sa3_convert.files import partial_folder
from sa3_convert.runtime.engines import EngineName
from sa3_convert.runtime.opening import bundle_engine
from sa3_convert.stage_cache import cache_beside
from sa3_convert.verify.generation import GenerationCase, all_cases
from sa3_convert.verify.prompts import PROMPTS
from sa3_convert.verify.reference_store import ReferenceStore
from sa3_convert.verify.sides import References, Side, Target

STEPS = 8
SEEDS = (0, 1)
DURATIONS = (2.0, 5.0, 10.0)
FULL_CASES: tuple[GenerationCase, ...] = all_cases(range(len(PROMPTS)), SEEDS, DURATIONS)
"""What a full verification generates."""
_END_TO_END_PROMPTS = (0, 1, 2, 6)
"""A sound, a piece of music, an effect, and a prompt that is not English."""


def end_to_end_cases(cases: Sequence[GenerationCase]) -> tuple[GenerationCase, ...]:
    """Return those of the cases that are decoded on both sides and beside the chaos floor.

    Of each of four prompts (of the first one, if there are other prompts only) the case of middle duration with the
    first seed.
    """
    prompts = [p for p in _END_TO_END_PROMPTS if any(case.prompt == p for case in cases)] or [cases[0].prompt]
    chosen = []
    for prompt in prompts:
        durations = sorted({case.seconds for case in cases if case.prompt == prompt})
        middle = durations[len(durations) // 2]
        chosen.append(next(case for case in cases if (case.prompt, case.seconds) == (prompt, middle)))
    return tuple(chosen)


@contextlib.contextmanager
def both_sides(
    bundle: Bundle,
    *,
    engine: EngineName = "mnn",
    store: ReferenceStore | None = None,
    steps: int = STEPS,
    threads: int | None = None,
) -> Iterator[tuple[References, Target]]:
    """Open a bundle's references and its target.

    Args:
        bundle: its files are checked against its manifest first.
        engine: what runs the target.
        store: where reference outputs are kept for the next time; None keeps them until the block ends.
        steps: of the denoising loop.
        threads: of either engine; None leaves it to them.

    Raises:
        BundleError: a file is not what the manifest says, or the bundle cannot generate.

    """
    for component in (Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER, Component.DIT):
        bundle.artifact(component)
    if bundle.layout.objective is None:
        raise BundleError(f"Bundle {bundle.path} holds an autoencoder alone; it cannot generate.")
    reference = Side(bundle, bundle_engine(bundle, "onnxruntime", {"threads": threads}))
    target = Side(bundle, bundle_engine(bundle, engine, {"threads": threads}))
    with contextlib.ExitStack() as stack:
        if store is None:
            place = Path(tempfile.gettempdir()) / "sa3-references"
            store = ReferenceStore(stack.enter_context(partial_folder(place)))
        try:
            yield References(reference, store, steps), Target(target, steps)
        finally:
            reference.close()
            target.close()


def default_references(bundle: Bundle) -> Path:
    """Return where a bundle's reference outputs are kept: in the folder of stages that `convert` keeps beside it."""
    return cache_beside(bundle.path) / "references"
