"""Which passes run for a component and a recipe, in order: from the reference ONNX to the one that is converted."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
from google.protobuf.message import DecodeError

from sa3_convert.components import Component
from sa3_convert.errors import ConversionError, ModelFileError
from sa3_convert.mnn.compatibility import DEFAULT_TARGET, MnnVersion, is_older
from sa3_convert.passes import softmax, spellings
from sa3_convert.passes.fp16_safe import make_fp16_safe
from sa3_convert.passes.fuse_weight_norm import fuse_weight_norm
from sa3_convert.passes.half import check_halves, compute_in_half, pass_through_half, round_to_half
from sa3_convert.passes.hazards import refuse_hazards
from sa3_convert.passes.integers import check_integers, compute_in_integers
from sa3_convert.passes.packed_channels import keep_channels_packed
from sa3_convert.passes.quantise_embedding import quantise_embedding
from sa3_convert.passes.scale_gated_products import scale_gated_products
from sa3_convert.passes.weights import lift_small_weights, round_weights, take_planned, weights_of
from sa3_convert.recipe import ComponentRecipe
from sa3_convert.system.files import atomic_pair
from sa3_convert.system.untrusted import open_regular

if TYPE_CHECKING:
    from sa3_convert.rounding.network import PlannedWeights

_DATA = ".data"
_EXTERNAL_FROM_BYTES = 256
"""Larger weights go to the data file; small constants, shapes among them, stay readable in the graph."""


@dataclass(frozen=True, slots=True)
class PassReport:
    """What each pass did."""

    rewrites: tuple[tuple[str, int], ...]

    def counts(self) -> dict[str, int]:
        """Return the number of rewrites by pass, in the order in which they ran."""
        return dict(self.rewrites)


def apply_passes(
    model: ir.Model,
    component: Component,
    recipe: ComponentRecipe,
    *,
    planned: "PlannedWeights | None" = None,
    target_mnn: MnnVersion = DEFAULT_TARGET,
) -> PassReport:
    """Rewrite a reference graph in place for MNN, and lint it.

    Weights that are rounded are computed when the model is saved.

    Args:
        model: rewritten in place.
        component: what the graph computes, for messages.
        recipe: how it is to be stored.
        planned: the weights that error-compensated rounding has made of the graph's own.
        target_mnn: the oldest MNN that the result must be right on; older ones need other spellings.

    Raises:
        ConversionError: a hazard is left, a pass that the recipe asks for found nothing to do, or it needs
            planned weights that are not given.

    """
    rewrites = tuple((name, rewrite(model)) for name, rewrite in _passes(component, recipe, planned, target_mnn))
    for name, count in rewrites:
        if not count and name in ("quantise_embedding", "round_weights"):
            what = "token table" if name == "quantise_embedding" else "linear or convolution"
            raise ConversionError(f"{component.value}: the recipe asks for {name}, but the graph has no {what} for it.")
    refuse_hazards(model, target_mnn=target_mnn)
    return PassReport(rewrites)


def _passes(
    component: Component, recipe: ComponentRecipe, planned: "PlannedWeights | None", target_mnn: MnnVersion
) -> list[tuple[str, Callable[[ir.Model], int]]]:
    half = recipe.floats == "fp16"
    passes: list[tuple[str, Callable[[ir.Model], int]]] = [("fuse_weight_norm", fuse_weight_norm)]
    if is_older(target_mnn, spellings.WHOLE_SHAPES_NEEDED_BEFORE):
        passes.append(("use_whole_shapes", spellings.use_whole_shapes))
    if is_older(target_mnn, spellings.SILU_NEEDED_BEFORE):
        passes.append(("spell_silu", spellings.spell_silu))
    finished: frozenset[str] = frozenset()
    if planned is not None:
        weights = planned
        finished = weights.names()
        passes.append(("take_planned", lambda model: take_planned(model, weights)))
    passes.append(("scale_gated_products", scale_gated_products))
    scheme = recipe.weights
    if scheme is not None:
        passes.append(("lift_small_weights", partial(lift_small_weights, scheme=scheme)))
    if is_older(target_mnn, softmax.NEEDED_BEFORE):
        passes.append(("subtract_row_maximum", softmax.subtract_row_maximum))
    if recipe.embedding != "float":
        kind = recipe.embedding
        passes.append(("quantise_embedding", lambda model: quantise_embedding(model, kind, half_scales=half)))
    if half:
        passes += [
            ("make_fp16_safe", make_fp16_safe),
            ("round_to_half", lambda model: round_to_half(model, weights_of(model, finished))),
        ]
    if scheme is not None and scheme.rounding != "converter":
        if recipe.compensates and planned is None:
            raise ConversionError(
                f"{component.value}: rounding: error_compensated needs weights that `convert` rounds ahead. "
                "Use that, or rounding: least_squares."
            )
        passes.append(("round_weights", lambda model: round_weights(model, scheme, finished)))
    # Last, since all others know linears as products.
    passes.append(("keep_channels_packed", keep_channels_packed))
    return passes


def onnx_for_mnn(
    reference: Path,
    target: Path,
    component: Component,
    recipe: ComponentRecipe,
    *,
    planned: "PlannedWeights | None" = None,
    target_mnn: MnnVersion = DEFAULT_TARGET,
) -> PassReport:
    """Rewrite the ONNX file `reference` into `target` and `target`.data; weights are never all in memory.

    `target` appears only when it is complete; what stood there is replaced.

    Raises:
        ModelFileError: `reference` is missing, damaged or no ONNX file, or its weights are.
        ConversionError: see `apply_passes`; or `target` cannot be written.

    """
    with opened_onnx(reference) as model:
        report = apply_passes(model, component, recipe, planned=planned, target_mnn=target_mnn)
        # Only a file has external data, and only there is it a hazard.
        save_onnx(model, target, check=lambda written: refuse_hazards(written, target_mnn=target_mnn))
    return report


@contextlib.contextmanager
def passed_through_half(
    reference: Path, folder: Path, component: Component, recipe: ComponentRecipe, target_mnn: MnnVersion
) -> Iterator[Path]:
    """Yield a file in `folder` with the numbers of `half.pass_through_half`, spelled for MNN but not quantised.

    Inputs and outputs keep their names and types.
    """
    spelled = recipe.model_copy(update={"weights": None, "embedding": "float"})
    with tempfile.TemporaryDirectory(prefix="half-", dir=folder) as scratch:
        written = Path(scratch) / reference.name
        with opened_onnx(reference) as model:
            apply_passes(model, component, spelled, target_mnn=target_mnn)
            pass_through_half(model)
            save_onnx(model, written)
        yield written


def onnx_in_half(reference: Path, target: Path) -> None:
    """Rewrite the ONNX file `reference` into one that stores and computes halves; see `half.compute_in_half`."""
    with opened_onnx(reference) as model:
        fuse_weight_norm(model)
        scale_gated_products(model)
        compute_in_half(model)
        save_onnx(model, target, check=check_halves)


def onnx_in_integers(reference: Path, target: Path, component: Component) -> int:
    """Rewrite the ONNX file `reference` into one that computes with integers; see `integers.compute_in_integers`.

    Returns:
        The number of products that do; 0 where a component has none to quantise.

    """

    def check(written: ir.Model) -> None:
        with opened_onnx(reference) as again:
            check_integers(written, again, component)

    with opened_onnx(reference) as model:
        count = compute_in_integers(model, component)
        save_onnx(model, target, check=check)
    return count


def save_onnx(model: ir.Model, target: Path, *, check: Callable[[ir.Model], None] = lambda _: None) -> None:
    """Write `target` and `target`.data, which appear only when they are complete; what stood there is replaced.

    Args:
        model: what to write; weights are computed, or read from their file, while they are written.
        target: the `.onnx` file.
        check: gets what was written; raises if it must not take its name.

    Raises:
        ConversionError: it cannot be written.

    """
    try:
        with atomic_pair(target, _DATA) as written:
            ir.save(
                model,
                written,
                format="protobuf",
                external_data=written.name + _DATA,
                size_threshold_bytes=_EXTERNAL_FROM_BYTES,
            )
            with opened_onnx(written) as found:
                check(found)
    except OSError as error:
        raise ConversionError(f"{target} cannot be written: {error}") from None


@contextlib.contextmanager
def opened_onnx(path: Path) -> Iterator[ir.Model]:
    """Yield what `load_onnx` gives; its weights are let go after the block: Windows replaces no file that is mapped."""
    model = load_onnx(path)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    try:
        yield model
    finally:
        for tensor in tensors:
            if isinstance(tensor, ir.ExternalTensor):
                with contextlib.suppress(BufferError):  # somebody still looks at it
                    tensor.release()


def load_onnx(path: Path) -> ir.Model:
    """Load an ONNX file; its weights stay in their file, mapped when they are needed.

    Raises:
        ModelFileError: it is missing, damaged or no ONNX file, or its external data is missing or too short.

    """
    try:
        open_regular(path).close()
        model = ir.load(path.resolve(), format="protobuf")
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist.") from None
    except (OSError, ValueError, DecodeError) as error:
        raise ModelFileError(f"{path} cannot be read as ONNX: {error}") from None
    if not model.graph.outputs:
        raise ModelFileError(f"{path} holds no ONNX graph.")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(path, tensor)
    return model


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    data = Path(tensor.path)
    if not data.is_file():
        raise ModelFileError(f"{path} needs {data.name} beside it for its weights; it is not there.")
    end = (tensor.offset or 0) + tensor.nbytes
    if data.stat().st_size < end:
        raise ModelFileError(
            f"{data} is cut short: {tensor.name!r} ends at byte {end}, the file at {data.stat().st_size}."
        )
