"""What half arithmetic leaves of a component, emulated in ONNX: what a phone gets that runs it at precision low.

Every number passes through a half: inputs, constants, and what each operator makes. So MNN computes on ARM at precision
low, but there products and convolutions add up in halves too, while here sums within an operator stay float32. Phases
that are lost show to 0.1 dB; where this says 55 to 64 dB of toy models, ARM has 49 to 50, and wide layers have longer
sums.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.mnn.compatibility import MnnVersion
from sa3_convert.passes import ir_tools
from sa3_convert.passes.half import round_to_half
from sa3_convert.passes.pipeline import apply_passes, opened_onnx, save_onnx
from sa3_convert.recipe import ComponentRecipe


@contextlib.contextmanager
def written_in_half(
    reference: Path, folder: Path, component: Component, recipe: ComponentRecipe, target_mnn: MnnVersion
) -> Iterator[Path]:
    """Yield a file in `folder` that computes with halves what `reference` is, spelled for MNN but not quantised.

    Inputs and outputs keep their names and types. See `passes.pipeline` for the errors.
    """
    spelled = recipe.model_copy(update={"weights": None, "embedding": "float"})
    with tempfile.TemporaryDirectory(prefix="half-", dir=folder) as scratch:
        written = Path(scratch) / reference.name
        with opened_onnx(reference) as model:
            apply_passes(model, component, spelled, target_mnn=target_mnn)
            pass_through_half(model)
            save_onnx(model, written)
        yield written


def pass_through_half(model: ir.Model) -> None:
    """Round every float32 number of a model to a half and back, in place; constants when the model is saved."""
    common.ShapeInferencePass()(model)
    graph = model.graph
    additions = ir_tools.Additions(graph)
    made = [value for node in graph for value in node.outputs if value.name]
    if unknown := next((value.name for value in made if value.dtype is None), None):
        raise ConversionError(f"It is not known of what type {unknown} is, so half arithmetic cannot be emulated.")
    round_to_half(model)
    for value in (*graph.inputs, *made):
        readers, producer = value.uses(), value.producer()
        if value.dtype is not ir.DataType.FLOAT or not readers:
            continue
        half = additions.node("Cast", [value], f"{value.name}.half", ir.DataType.FLOAT16, to=ir.DataType.FLOAT16)
        rounded = additions.node("Cast", [half], f"{value.name}.rounded", to=ir.DataType.FLOAT)
        for reader, index in readers:
            reader.replace_input_with(index, rounded)
        if producer is None:
            additions.insert_before(graph[0])
        else:
            graph.insert_after(producer, additions.nodes)
            additions.nodes = []
