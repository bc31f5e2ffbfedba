"""What a bundle says about its models, held to what its files say, before any of them is run."""

from dataclasses import dataclass
from pathlib import Path

from sa3_convert.bundle.manifest import Artifact, Bundle
from sa3_convert.components import Component
from sa3_convert.errors import ConversionError, VerificationError
from sa3_convert.recipe import Recipe, load_recipe
from sa3_convert.runtime.engines import EngineName


@dataclass(frozen=True, slots=True)
class Judged:
    """A model of the bundle, and what is asked of it."""

    component: Component
    engine: EngineName
    artifact: Artifact
    floor_db: float


def bundle_recipe(bundle: Bundle) -> Recipe:
    """Return the recipe in a bundle.

    Raises:
        RecipeError: it is not valid.
        VerificationError: it is another than the manifest names.

    """
    with bundle.reading("recipe") as file:
        recipe = load_recipe(file, resolved=True)
    if recipe.name != bundle.manifest.recipe:
        raise VerificationError(
            f"Bundle {bundle.path} says that it was made with recipe {bundle.manifest.recipe!r}, and holds recipe "
            f"{recipe.name!r}. Convert again."
        )
    return recipe


def models_of(bundle: Bundle, recipe: Recipe, component: Component) -> list[Judged]:
    """Return the models of a component, their files held to manifest and recipe.

    Raises:
        VerificationError: manifest, recipe and file disagree about what is stored.
        ModelFileError: a file cannot be read.

    """
    wanted = recipe.for_component(component)
    models = [Judged(component, "mnn", bundle.artifact(component), wanted.floor_db)]
    _check_claims(bundle.file(component), models[0].artifact, wanted.precision, wanted.floor_db, "recipe")
    _check_storage(bundle, recipe, component)
    if any(a.component is component and a.kind == "onnx-int8" for a in bundle.manifest.artifacts):
        models.append(_integer_form(bundle, component))
    return models


def _integer_form(bundle: Bundle, component: Component) -> Judged:
    from sa3_convert.quantise.ort_int8 import FLOORS_DB, check_integer_form

    artifact, file = bundle.artifact(component, "onnx-int8"), bundle.file(component, "onnx-int8")
    reference, integer = (bundle.checked(component, kind) for kind in ("onnx", "onnx-int8"))
    try:
        products = check_integer_form(reference.path, integer.path)
    except ConversionError as error:
        raise VerificationError(f"{file} is not the integer form of its reference. {error}") from None
    floor = FLOORS_DB[component]
    _check_claims(file, artifact, "int8" if products else "fp32", floor, "quantiser")
    return Judged(component, "onnxruntime-int8", artifact, floor)


def _check_claims(file: Path, artifact: Artifact, precision: str, floor_db: float, source: str) -> None:
    """Hold what the manifest says of a model to what its recipe or quantiser says."""
    if artifact.precision != precision:
        raise VerificationError(
            f"{file}: the manifest calls it {artifact.precision}, its {source} makes {precision}. Convert again."
        )
    if artifact.floor_db is not None and artifact.floor_db != floor_db:
        raise VerificationError(
            f"{file}: the manifest's floor is {artifact.floor_db:g} dB, its {source}'s {floor_db:g} dB. Convert again."
        )


def _check_storage(bundle: Bundle, recipe: Recipe, component: Component) -> None:
    """Hold manifest and recipe to what the bytes of a `.mnn` say."""
    from sa3_convert.mnn.audit import audit
    from sa3_convert.mnn.readers import check_reader
    from sa3_convert.mnn.storage import read_storage

    artifact, file = bundle.artifact(component), bundle.file(component)
    storage = read_storage(bundle.checked(component).path)
    try:
        audit(storage, recipe.for_component(component))
        if artifact.target_mnn is not None:
            check_reader(storage, artifact.target_mnn)
    except ConversionError as error:
        raise VerificationError(f"{file} does not hold what the bundle promises. {error}") from None
    if artifact.storage is not None and artifact.storage != storage.summary():
        raise VerificationError(f"{file} stores its weights otherwise than the manifest says. Convert again.")
