"""Reference and target on the same inputs, one model in memory at a time, then compared."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_convert.arrays import Session
from sa3_convert.check.inputs import Sample
from sa3_convert.check.metrics import MAX_DB, sums_of
from sa3_convert.check.results import ComponentFidelity, Measurement
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import Component, Contract, contract
from sa3_convert.errors import VerificationError

Outputs = dict[str, NDArray[Any]]


def verify_sessions(
    reference: Callable[[], Session],
    target: Callable[[], Session],
    component: Component,
    layout: CheckpointLayout,
    samples: Sequence[Sample],
    in_half: Callable[[], Session] | None = None,
) -> ComponentFidelity:
    """Compare two models of a component; each is opened for its runs and gone before the other is.

    Args:
        reference: opens what is right.
        target: opens what is judged.
        component: which one both of them are.
        layout: the checkpoint's dimensions.
        samples: the inputs.
        in_half: opens what computes with halves; beyond their range its ratio is −300 dB.

    Raises:
        VerificationError: an output is missing, non-finite, or not of the contract's shape; or there is no sample.
        ModelFileError: a file cannot be loaded or run.

    """
    expected = run_samples(reference(), samples)
    found = compare_runs(component, layout, samples, expected, run_samples(target(), samples))
    if in_half is None:
        return found
    halves, half_db = run_samples(in_half(), samples), -MAX_DB
    if all(np.isfinite(array).all() for outputs in halves for array in outputs.values()):
        half_db = compare_runs(component, layout, samples, expected, halves).worst.signal_to_noise_db
    return replace(found, half_db=half_db)


def run_samples(session: Session, samples: Iterable[Sample]) -> list[Outputs]:
    """Return the outputs of every sample, in order; one that does not take them is of another component."""
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
    """Return the figures of finished runs; what cannot be compared raises VerificationError."""
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
