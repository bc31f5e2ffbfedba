"""A whole bundle: its files are what the manifest and the recipe say, and each model is close to its reference."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.components import Component
from sa3_convert.errors import VerificationError
from sa3_convert.runtime.engines import EngineName
from sa3_convert.runtime.opening import KINDS, bundle_engine
from sa3_convert.verify.cases import samples_for
from sa3_convert.verify.claims import Judged, bundle_recipe, models_of
from sa3_convert.verify.compare import Outputs, compare_runs, run_samples
from sa3_convert.verify.inputs import Sample
from sa3_convert.verify.progress import Report, sampled_stage
from sa3_convert.verify.reference_store import ReferenceStore, digest_of
from sa3_convert.verify.result import BundleFidelity, Verdict

_REFERENCE: EngineName = "onnxruntime"


def verify_bundle(
    bundle: Bundle,
    *,
    components: tuple[Component, ...] = (),
    quick: bool = False,
    threads: int | None = None,
    store: ReferenceStore | None = None,
    progress: Report = lambda what, done, total: None,
    report: Callable[[Verdict], None] = lambda _: None,
    settings: Mapping[str, Any] | None = None,
) -> BundleFidelity:
    """Compare every model of a bundle with ONNX Runtime on the reference ONNX in the bundle.

    Models are the `.mnn` files and, where the bundle has them, the integer forms for ONNX Runtime. The floors and what
    the files must hold come from the bundle's recipe (for the integer forms from `quantise.ort_int8`). The figures that
    the manifest claims are measured again. All files are checked before the first model is loaded; one model is in
    memory at a time.

    Args:
        bundle: the bundle.
        components: which ones; empty is all that the bundle has.
        quick: fewer and shorter inputs: what a conversion runs.
        threads: of either engine; None leaves it to them.
        store: where the reference's outputs are kept for the next time; None computes them.
        progress: called as work goes on.
        report: called after each model.
        settings: how MNN runs its models (backend, memory, precision). The manifest's claims were measured on the CPU
            with the usual ones, so with others they are not held against the figures.

    Returns:
        The figures; `BundleFidelity.check` raises if one is below its floor.

    Raises:
        BundleError: a file is missing or is not what the manifest says, or the bundle has no such component.
        BackendError: the installed MNN does not have the backend.
        VerificationError: manifest, recipe and file disagree about what is stored, or an output cannot be compared.
        ModelFileError: a file cannot be loaded or run.

    """
    selected = components or bundle.components
    if not selected:
        raise VerificationError(f"Bundle {bundle.path} has no model to verify.")
    for component in selected:
        bundle.file(component, "mnn"), bundle.file(component, "onnx")
    bundle.check(selected, kinds=tuple(KINDS.values()))
    recipe = bundle_recipe(bundle)
    judged = {component: models_of(bundle, recipe, component) for component in selected}
    verdicts: list[Verdict] = []
    for component, models in judged.items():
        samples = samples_for(component, bundle.layout, quick=quick)
        expected = _expected(bundle, component, samples, threads, store, progress)
        for model in models:
            verdicts.append(_verdict(bundle, model, samples, expected, threads, progress, settings or {}))
            report(verdicts[-1])
    return BundleFidelity(bundle.manifest.label, recipe.name, tuple(verdicts))


def _expected(
    bundle: Bundle,
    component: Component,
    samples: list[Sample],
    threads: int | None,
    store: ReferenceStore | None,
    progress: Report,
) -> list[Outputs]:
    """Return the reference's outputs, from the store where it has them; the model is loaded when one is missing."""
    engine = bundle_engine(bundle, _REFERENCE, {"threads": threads})
    session = functools.cache(lambda: engine.load(component))

    def compute(sample: Sample) -> Outputs:
        return run_samples(session(), [sample])[0]

    hashes = [entry.sha256 for entry in bundle.artifact(component, "onnx").files]
    outputs = []
    for done, sample in enumerate(samples):
        progress(sampled_stage(component, _REFERENCE), done, len(samples))
        if store is None:
            outputs.append(compute(sample))
        else:
            kept = functools.partial(compute, sample)
            outputs.append(store.get(kept, model=hashes, feeds=digest_of(sample.feeds)))
    return outputs


def _verdict(
    bundle: Bundle,
    model: Judged,
    samples: list[Sample],
    expected: list[Outputs],
    threads: int | None,
    progress: Report,
    settings: Mapping[str, Any],
) -> Verdict:
    component = model.component
    options = {"threads": threads, **(settings if model.engine == "mnn" else {})}
    session = bundle_engine(bundle, model.engine, options).load(component)
    actual = []
    for done, sample in enumerate(samples):
        progress(sampled_stage(component, model.engine), done, len(samples))
        actual += run_samples(session, [sample])
    fidelity = compare_runs(component, bundle.layout, samples, expected, actual)
    claim = None if settings else model.artifact.fidelity
    again = fidelity.over({sample.name for sample in samples_for(component, bundle.layout, quick=True)})
    return Verdict(
        fidelity,
        model.floor_db,
        model.artifact.precision or "",
        claimed_db=None if claim is None else claim.signal_to_noise_db,
        measured_db=again.worst.signal_to_noise_db,
        engine=model.engine,
    )
