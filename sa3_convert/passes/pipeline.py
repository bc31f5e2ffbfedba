"""Which passes run for a component and a recipe, in order: from the reference ONNX to the one that is converted."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from sa3_convert.components import Component
from sa3_convert.errors import ConversionError, ModelFileError
from sa3_convert.passes.fp16_safe import make_fp16_safe
from sa3_convert.passes.fuse_weight_norm import fuse_weight_norm
from sa3_convert.passes.half import round_to_half
from sa3_convert.passes.hazards import refuse_hazards
from sa3_convert.passes.quantise_embedding import quantise_embedding
from sa3_convert.recipe import ComponentRecipe


@dataclass(frozen=True, slots=True)
class PassReport:
    """What each pass did."""

    rewrites: tuple[tuple[str, int], ...]

    def counts(self) -> dict[str, int]:
        """Return the number of rewrites by pass, in the order in which they ran."""
        return dict(self.rewrites)


def apply_passes(model: ir.Model, component: Component, recipe: ComponentRecipe) -> PassReport:
    """Rewrite a reference graph in place for MNN.

    Raises:
        ConversionError: a hazard is left, or a pass that the recipe asks for found nothing to do.

    """
    passes: list[tuple[str, Callable[[ir.Model], int]]] = [("fuse_weight_norm", fuse_weight_norm)]
    if recipe.embedding != "float":
        kind: Literal["int8", "int4"] = recipe.embedding
        half = recipe.floats == "fp16"
        passes.append(("quantise_embedding", lambda m: quantise_embedding(m, kind, half_scales=half)))
    if recipe.floats == "fp16":
        passes += [("make_fp16_safe", make_fp16_safe), ("round_to_half", round_to_half)]
    rewrites = tuple((name, rewrite(model)) for name, rewrite in passes)
    if ("quantise_embedding", 0) in rewrites:
        raise ConversionError(
            f"{component.value}: the recipe asks for an {recipe.embedding} embedding; none was found."
        )
    refuse_hazards(model)
    return PassReport(rewrites)


def onnx_for_mnn(reference: Path, target: Path, component: Component, recipe: ComponentRecipe) -> PassReport:
    """Rewrite the ONNX file `reference` into `target`, weights as external data; they are never all in memory.

    Raises:
        ModelFileError: `reference` is missing or no ONNX file.
        ConversionError: see `apply_passes`.

    """
    try:
        model = ir.load(reference)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{reference} cannot be read as ONNX: {error}") from None
    report = apply_passes(model, component, recipe)
    ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=256)
    return report
