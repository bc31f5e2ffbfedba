"""A whole bundle: its files are what the manifest and the recipe say, and each model is close to its reference."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sa3_convert.bundle.manifest import SLOTS_OF, Artifact, ArtifactKind
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.compare import Outputs, compare_runs, run_samples
from sa3_convert.check.inputs import Sample, samples_for
from sa3_convert.check.reference_store import ReferenceStore, digest_of
from sa3_convert.check.results import BundleFidelity, Progress, Verdict, sampled_stage
from sa3_convert.components import SLOT_INPUTS, Component
from sa3_convert.errors import ConversionError, ModelFileError, VerificationError
from sa3_convert.recipe import Recipe, load_recipe
from sa3_convert.runtime.engines import KINDS, EngineName, bundle_engine


@dataclass(frozen=True, slots=True)
class Judged:
    """A model of the bundle, and what is asked of it."""

    component: Component
    engine: EngineName
    artifact: Artifact
    floor_db: float

    @property
    def rank(self) -> int | None:
        """Of its slots for adapters."""
        return self.artifact.rank


def bundle_recipe(bundle: Bundle) -> Recipe:
    """Return the recipe in a bundle, which must be the one that the manifest names."""
    with bundle.reading("recipe") as file:
        recipe = load_recipe(file, resolved=True)
    if recipe.name != bundle.manifest.recipe:
        raise VerificationError(
            f"Bundle {bundle.path} says that it was made with recipe {bundle.manifest.recipe!r}, and holds recipe "
            f"{recipe.name!r}. Convert again."
        )
    return recipe


def models_of(bundle: Bundle, recipe: Recipe, component: Component) -> list[Judged]:
    """Return the models of a component, their files held to manifest and recipe, which must agree."""
    wanted = recipe.for_component(component)
    listed = {a.kind for a in bundle.manifest.artifacts if a.component is component}
    models: list[Judged] = []
    for kind in ("mnn", *listed & {SLOTS_OF["mnn"]}):
        models.append(Judged(component, "mnn", bundle.artifact(component, kind), wanted.floor_db))
        _check_claims(bundle.file(component, kind), models[-1].artifact, wanted.precision, wanted.floor_db, "recipe")
        _check_storage(bundle, recipe, models[-1].artifact)
    forms: tuple[EngineName, ...] = ("onnxruntime-int8", "onnxruntime-fp16")
    for engine in forms:
        # In this order, and not a set's, which is another one in every process.
        kinds = (KINDS[engine], SLOTS_OF[KINDS[engine]])
        models += [_onnx_form(bundle, component, engine, kind) for kind in kinds if kind in listed]
    return models


def _onnx_form(bundle: Bundle, component: Component, engine: EngineName, kind: ArtifactKind) -> Judged:
    from sa3_convert.passes import half, integers
    from sa3_convert.passes.pipeline import opened_onnx
    from sa3_convert.passes.split import check_parts

    artifact, file = bundle.artifact(component, kind), bundle.file(component, kind)
    of: ArtifactKind = "onnx" if artifact.rank is None else SLOTS_OF["onnx"]
    reference, form = (bundle.checked(component, one).path for one in (of, kind))
    halves = engine == "onnxruntime-fp16"
    floors, precision = (half.FLOORS_DB, "fp16") if halves else (integers.FLOORS_DB, "int8")
    try:
        with opened_onnx(form) as model, opened_onnx(reference) as original:
            if halves:
                half.check_halves(model)
            elif not integers.check_integers(model, original, component):
                precision = "fp32"
        if parts := bundle.checked_parts(component, kind):
            check_parts(form, component, [part.path for part in parts])
    except (ConversionError, ModelFileError) as error:
        raise VerificationError(f"{file} is not the {precision} form of its reference. {error}") from None
    _check_claims(file, artifact, precision, floors[component], "maker")
    return Judged(component, engine, artifact, floors[component])


def _check_claims(file: Path, artifact: Artifact, precision: str, floor_db: float, source: str) -> None:
    """Hold what the manifest says of a model to what its recipe or maker says."""
    if artifact.precision != precision:
        raise VerificationError(
            f"{file}: the manifest calls it {artifact.precision}, its {source} makes {precision}. Convert again."
        )
    if artifact.floor_db is not None and artifact.floor_db != floor_db:
        raise VerificationError(
            f"{file}: the manifest's floor is {artifact.floor_db:g} dB, its {source}'s {floor_db:g} dB. Convert again."
        )


def _check_storage(bundle: Bundle, recipe: Recipe, artifact: Artifact) -> None:
    """Hold manifest and recipe to what the bytes of a `.mnn` say."""
    from sa3_convert.mnn.compatibility import check_reader
    from sa3_convert.mnn.file.audit import audit
    from sa3_convert.mnn.file.storage import read_storage

    component = artifact.component
    assert component is not None
    file = bundle.file(component, artifact.kind)
    storage = read_storage(bundle.checked(component, artifact.kind).path)
    try:
        audit(storage, recipe.for_component(component))
        if artifact.target_mnn is not None:
            check_reader(storage, artifact.target_mnn)
    except ConversionError as error:
        raise VerificationError(f"{file} does not hold what the bundle promises. {error}") from None
    if artifact.storage is not None and artifact.storage != storage.summary():
        raise VerificationError(f"{file} stores its weights otherwise than the manifest says. Convert again.")


_REFERENCE: EngineName = "onnxruntime"


def verify_bundle(
    bundle: Bundle,
    *,
    components: tuple[Component, ...] = (),
    quick: bool = False,
    threads: int | None = None,
    store: ReferenceStore | None = None,
    progress: Progress = lambda what, done, total: None,
    report: Callable[[Verdict], None] = lambda _: None,
    settings: Mapping[str, Any] | None = None,
) -> BundleFidelity:
    """Compare every model of a bundle with ONNX Runtime on the reference ONNX in the bundle.

    Models are the `.mnn` files and, where the bundle has them, the forms for ONNX Runtime. The floors and what files
    must hold come from the bundle's recipe (for those forms from what makes them). The figures that the manifest claims
    are measured again. All files are checked before the first model is loaded; one model is in
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
    bundle.check(selected, kinds=(*KINDS.values(), *SLOTS_OF.values()))
    recipe = bundle_recipe(bundle)
    judged = {component: models_of(bundle, recipe, component) for component in selected}
    verdicts: list[Verdict] = []
    adapted: list[Verdict] = []
    for component, models in judged.items():
        for rank in dict.fromkeys(model.rank for model in models):
            samples = samples_for(component, bundle.layout, quick=quick, rank=rank)
            expected = _expected(bundle, component, samples, threads, store, progress, rank)
            for model in (one for one in models if one.rank == rank):
                found = _verdict(bundle, model, samples, expected, threads, progress, settings or {})
                (verdicts if rank is None else adapted).append(found)
                report(found)
    return BundleFidelity(bundle.manifest.label, recipe.name, tuple(verdicts), adapted=tuple(adapted))


def _expected(
    bundle: Bundle,
    component: Component,
    samples: list[Sample],
    threads: int | None,
    store: ReferenceStore | None,
    progress: Progress,
    rank: int | None,
) -> list[Outputs]:
    """Return the reference's outputs, from the store where it has them; the model is loaded when one is missing.

    Of a model with slots and no adapters in them the reference is the plain one: both are of the same weights.
    """
    sessions = functools.cache(
        lambda rank: bundle_engine(bundle, _REFERENCE, {"threads": threads}, rank=rank).load(component)
    )

    def compute(sample: Sample) -> Outputs:
        if rank is not None and not any(sample.feeds[name].any() for name in SLOT_INPUTS):
            plain = {name: array for name, array in sample.feeds.items() if name not in SLOT_INPUTS}
            return run_samples(sessions(None), [replace(sample, feeds=plain)])[0]
        return run_samples(sessions(rank), [sample])[0]

    kinds: tuple[ArtifactKind, ...] = ("onnx",) if rank is None else ("onnx", SLOTS_OF["onnx"])
    hashes = [entry.sha256 for kind in kinds for entry in bundle.artifact(component, kind).files]
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
    progress: Progress,
    settings: Mapping[str, Any],
) -> Verdict:
    component = model.component
    options = {"threads": threads, **(settings if model.engine == "mnn" else {})}
    session = bundle_engine(bundle, model.engine, options, rank=model.rank).load(component)
    actual = []
    for done, sample in enumerate(samples):
        progress(sampled_stage(component, model.engine), done, len(samples))
        actual += run_samples(session, [sample])
    fidelity = compare_runs(component, bundle.layout, samples, expected, actual)
    claim = None if settings else model.artifact.fidelity
    claimed = samples_for(component, bundle.layout, quick=True, rank=model.rank)
    again = fidelity.over({sample.name for sample in claimed})
    return Verdict(
        component,
        fidelity.measurements,
        model.floor_db,
        model.artifact.precision or "",
        claimed_db=None if claim is None else claim.signal_to_noise_db,
        measured_db=again.worst.signal_to_noise_db,
        engine=model.engine,
        half_db=model.artifact.half_db,
    )
