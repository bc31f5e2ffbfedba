"""One component's files: ONNX Runtime on the reference, MNN on the target, one model in memory at a time."""

import os
from collections.abc import Callable
from pathlib import Path

from sa3_convert.checkpoint.layout import CheckpointLayout
from sa3_convert.components import Component, contract
from sa3_convert.session import Session
from sa3_convert.verify.cases import samples_for
from sa3_convert.verify.compare import compare_runs, run_samples
from sa3_convert.verify.result import ComponentFidelity


def verify_files(
    reference: Path,
    target: Path,
    component: Component,
    layout: CheckpointLayout,
    *,
    quick: bool = False,
    threads: int | None = None,
) -> ComponentFidelity:
    """Compare a `.mnn` file with the ONNX file it came from.

    Args:
        reference: the fp32 ONNX, as exported.
        target: the `.mnn`.
        component: which one both of them are.
        layout: the checkpoint's dimensions.
        quick: fewer and shorter inputs.
        threads: of either engine; None is one per available processor.

    Raises:
        VerificationError: an output is missing, non-finite or of the wrong shape.
        ModelFileError: a file cannot be loaded or run.

    """
    from sa3_convert.mnn.session import MnnSession

    ports = contract(component, layout)
    names = [port.name for port in ports.inputs], [port.name for port in ports.outputs]

    def open_target(threads: int) -> Session:
        return MnnSession(target, inputs=names[0], outputs=names[1], threads=threads)

    return _verified(reference, open_target, component, layout, quick, threads)


def verify_onnx(
    reference: Path,
    target: Path,
    component: Component,
    layout: CheckpointLayout,
    *,
    quick: bool = False,
    threads: int | None = None,
) -> ComponentFidelity:
    """Compare an ONNX file that was quantised, run with all optimisations, with the reference; see `verify_files`."""
    from sa3_convert.ort import OrtSession

    def open_target(threads: int) -> Session:
        return OrtSession(target, threads=threads, optimise=True)

    return _verified(reference, open_target, component, layout, quick, threads)


def verify_split(
    reference: Path,
    prepare: Path,
    step: Path,
    component: Component,
    layout: CheckpointLayout,
    *,
    quick: bool = False,
    threads: int | None = None,
) -> ComponentFidelity:
    """Compare a model in two `.mnn` files, run as one, with the reference; see `verify_files`."""
    from sa3_convert.mnn.session import MnnSession
    from sa3_convert.runtime.split_session import SplitSession

    def open_target(threads: int) -> Session:
        return SplitSession(MnnSession(prepare, threads=threads), MnnSession(step, threads=threads))

    return _verified(reference, open_target, component, layout, quick, threads)


def _verified(
    reference: Path,
    open_target: Callable[[int], Session],
    component: Component,
    layout: CheckpointLayout,
    quick: bool,
    threads: int | None,
) -> ComponentFidelity:
    from sa3_convert.ort import OrtSession

    threads = threads or os.cpu_count() or 1
    samples = samples_for(component, layout, quick=quick)
    # Each session lives only as long as its runs.
    expected = run_samples(OrtSession(reference, threads=threads), samples)
    actual = run_samples(open_target(threads), samples)
    return compare_runs(component, layout, samples, expected, actual)
