"""Reference and target on the same inputs, one model in memory at a time, then compared."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sa3_convert.arrays import Session
from sa3_convert.check.inputs import Sample, sample_inputs, samples_for
from sa3_convert.check.metrics import sums_of
from sa3_convert.check.results import ComponentFidelity, Measurement
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import Component, Contract, contract
from sa3_convert.errors import VerificationError

Outputs = dict[str, NDArray[Any]]


def verify_component(
    reference: Session,
    target: Session,
    component: Component,
    layout: CheckpointLayout,
    *,
    lengths: Sequence[int],
    seeds: Sequence[int],
) -> ComponentFidelity:
    """Compare two sessions on every combination of length and seed.

    Args:
        reference: what is right.
        target: what is judged.
        component: which one both of them are.
        layout: the checkpoint's dimensions.
        lengths: numbers of latents; only the first counts for a component without a length.
        seeds: see `sample_inputs`.

    Raises:
        VerificationError: an output is missing, non-finite, or not of the contract's shape; or there is no case.

    """
    if not contract(component, layout).is_dynamic:
        lengths = lengths[:1]
    samples = [sample_inputs(component, layout, seed=s, latents=n) for n in lengths for s in seeds]
    expected = run_samples(reference, samples)
    return compare_runs(component, layout, samples, expected, run_samples(target, samples))


def run_samples(session: Session, samples: Iterable[Sample]) -> list[Outputs]:
    """Return the outputs of every sample, in order; they are small beside any model.

    Raises:
        VerificationError: the model does not take these inputs: it is of another component or another layout.

    """
    try:
        return [session.run(sample.feeds) for sample in samples]
    except ValueError as error:
        raise VerificationError(f"A model does not take the inputs that its component should: {error}.") from None


def compare_runs(
    component: Component,
    layout: CheckpointLayout,
    samples: Sequence[Sample],
    reference: Sequence[Outputs],
    target: Sequence[Outputs],
) -> ComponentFidelity:
    """Return the figures of finished runs.

    Raises:
        VerificationError: as `verify_component`.

    """
    ports = contract(component, layout)
    measurements: list[Measurement] = []
    for sample, expected, actual in zip(samples, reference, target, strict=True):
        measurements += _measure(component, ports, sample, expected, actual)
    return ComponentFidelity(component, tuple(measurements))


def _measure(
    component: Component, ports: Contract, sample: Sample, expected: Outputs, actual: Outputs
) -> list[Measurement]:
    measurements = []
    for port in ports.outputs:
        what = f"{port.name} ({component.value}, {sample.name})"
        reference, target = expected.get(port.name), actual.get(port.name)
        shape = port.concrete(sample.latents)
        if reference is not None and reference.shape != shape:
            raise VerificationError(
                f"The reference's {what} has shape {list(reference.shape)}, the contract says {list(shape)}."
            )
        # All of it must be comparable, padded positions included, before any part of it is.
        sums_of(reference, target, what=what)
        assert reference is not None
        assert target is not None
        for region in sample.regions:
            label = f"{port.name} ({region.label})" if region.label else port.name
            sums = sums_of(region.of(reference), region.of(target), what=what)
            measurements.append(Measurement(sample.name, label, sums))
    return measurements


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
    from sa3_convert.runtime.sessions import SplitSession

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
