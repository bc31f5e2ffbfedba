"""A whole bundle: its files are what the manifest and the recipe say, and each model is close to its reference."""

from collections.abc import Callable
from pathlib import Path

from sa3_convert.bundle.manifest import Artifact, Bundle
from sa3_convert.components import Component
from sa3_convert.errors import ConversionError, VerificationError
from sa3_convert.recipe import ComponentRecipe, Recipe, load_recipe
from sa3_convert.verify.cases import samples_for
from sa3_convert.verify.component import verify_files
from sa3_convert.verify.result import BundleFidelity, Verdict


def verify_bundle(
    bundle: Bundle,
    *,
    components: tuple[Component, ...] = (),
    quick: bool = False,
    threads: int | None = None,
    report: Callable[[Verdict], None] = lambda _: None,
) -> BundleFidelity:
    """Compare every `.mnn` of a bundle with ONNX Runtime on the reference ONNX in the bundle.

    The floors and what the files must hold come from the bundle's recipe. The figures that the manifest claims are
    measured again. All files are checked before the first model
    is loaded; one model is in memory at a time.

    Args:
        bundle: the bundle.
        components: which ones; empty is all that the bundle has.
        quick: fewer and shorter inputs: what a conversion runs.
        threads: of either engine; None is one per processor.
        report: called after each component.

    Returns:
        The figures; `BundleFidelity.check` raises if one is below its floor.

    Raises:
        BundleError: a file is missing or is not what the manifest says, or the bundle has no such component.
        VerificationError: manifest, recipe and file disagree about what is stored, or an output cannot be compared.
        ModelFileError: a file cannot be loaded or run.

    """
    selected = components or bundle.components
    if not selected:
        raise VerificationError(f"Bundle {bundle.path} has no model to verify.")
    for component in selected:
        bundle.file(component, "mnn"), bundle.file(component, "onnx")
    bundle.check(selected, kinds=("mnn", "onnx"))
    recipe = _recipe(bundle)
    for component in selected:
        _check_storage(bundle.path, bundle.artifact(component), recipe.for_component(component))
    verdicts = []
    for component in selected:
        wanted = recipe.for_component(component)
        fidelity = verify_files(
            bundle.file(component, "onnx"),
            bundle.file(component, "mnn"),
            component,
            bundle.layout,
            quick=quick,
            threads=threads,
        )
        claim = bundle.artifact(component).fidelity
        again = fidelity.over({sample.name for sample in samples_for(component, bundle.layout, quick=True)})
        verdicts.append(
            Verdict(
                fidelity,
                wanted.floor_db,
                wanted.precision,
                claimed_db=None if claim is None else claim.signal_to_noise_db,
                measured_db=again.worst.signal_to_noise_db,
            )
        )
        report(verdicts[-1])
    return BundleFidelity(bundle.manifest.variant, recipe.name, tuple(verdicts))


def _recipe(bundle: Bundle) -> Recipe:
    recipe = load_recipe(bundle.file(None, "recipe"))
    if recipe.name != bundle.manifest.recipe:
        raise VerificationError(
            f"Bundle {bundle.path} says that it was made with recipe {bundle.manifest.recipe!r}, and holds recipe "
            f"{recipe.name!r}. Convert again."
        )
    return recipe


def _check_storage(folder: Path, artifact: Artifact, recipe: ComponentRecipe) -> None:
    """Hold manifest and recipe to what the file's bytes say."""
    from sa3_convert.mnn.audit import audit
    from sa3_convert.mnn.storage import read_storage

    file = folder / artifact.path
    if artifact.precision != recipe.precision:
        raise VerificationError(
            f"{file}: the manifest calls it {artifact.precision}, its recipe makes {recipe.precision}. Convert again."
        )
    if artifact.floor_db is not None and artifact.floor_db != recipe.floor_db:
        raise VerificationError(
            f"{file}: the manifest's floor is {artifact.floor_db:g} dB, its recipe's {recipe.floor_db:g} dB. "
            "Convert again."
        )
    storage = read_storage(file)
    try:
        audit(storage, recipe)
    except ConversionError as error:
        raise VerificationError(f"{file} does not hold what the bundle's recipe asks for. {error}") from None
    if artifact.storage is not None and artifact.storage != storage.summary():
        raise VerificationError(f"{file} stores its weights otherwise than the manifest says. Convert again.")
