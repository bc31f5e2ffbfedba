"""`export`, `fuse` and `mnn`: the stages of a conversion one at a time."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from sa3_convert.cli import options as o
from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.mnn.compatibility import target_for


def export(
    checkpoint: o.CheckpointArgument,
    component: o.OneComponentOption,
    out: Annotated[Path, Option(metavar="FILE.onnx", help="The reference ONNX.", callback=paths.writes_model)],
    lora: o.LoraOption = None,
    inputs_embeds: Annotated[
        bool, Option("--inputs-embeds", help="Of text_encoder: take rows of its table and a float mask, no integers.")
    ] = False,
) -> None:
    """Stage 1: a component as fp32 ONNX, weights in FILE.onnx.data."""
    if inputs_embeds and component is not Component.TEXT_ENCODER:
        raise UsageError("--inputs-embeds is for --component text_encoder.")
    from sa3_convert.components import contract
    from sa3_convert.export.component import export_component, export_embedded_text_encoder

    opened = o.open_checkpoint(checkpoint, lora)
    contract(component, opened.layout)
    opened.check_values(component)
    if inputs_embeds:
        export_embedded_text_encoder(opened, out)
    else:
        export_component(opened, component, out)
    echo(f"{out}: {component.value} of {checkpoint}")


def fuse(
    reference: Annotated[Path, Argument(metavar="FILE.onnx", help="What `export` wrote.", callback=paths.reads)],
    component: o.OneComponentOption,
    out: Annotated[Path, Option(metavar="FILE.onnx", help="The ONNX for MNN.", callback=paths.writes_model)],
    recipe: o.RecipeOption = o.DEFAULT_RECIPE,
    target_mnn: o.TargetOption = None,
) -> None:
    """Stage 2: make an ONNX safe for MNN, and lint it for hazards."""
    from sa3_convert.passes.pipeline import onnx_for_mnn

    chosen = o.open_recipe(recipe).for_component(component)
    report = onnx_for_mnn(reference, out, component, chosen, target_mnn=target_for(chosen, target_mnn))
    for name, count in report.counts().items():
        echo(f"{name:<24} {count}")
    echo(f"{out}: no hazards")


def mnn(
    source: Annotated[
        Path, Argument(metavar="FILE.onnx", help="What `fuse` wrote, or another graph.", callback=paths.reads)
    ],
    component: o.OneComponentOption,
    out: Annotated[Path, Option(metavar="FILE.mnn", help="The model.", callback=paths.writes_model)],
    recipe: o.RecipeOption = o.DEFAULT_RECIPE,
    target_mnn: o.TargetOption = None,
    floor_db: Annotated[
        float | None, Option(min=0, help="Least ratio against ONNX Runtime; the recipe's when not given.")
    ] = None,
    input_file: Annotated[
        Path | None,
        Option(
            "--input",
            metavar="FILE.npz",
            help="Inputs by name to compare with, instead of made-up ones.",
            callback=paths.reads,
        ),
    ] = None,
) -> None:
    """Stage 3: convert with MNN, and judge what it wrote.

    The hazard lint comes first; the file, and its outputs beside ONNX Runtime's, last.
    """
    from sa3_convert.check.any_graph import verify_any
    from sa3_convert.lab.bisect.bisect import read_arrays
    from sa3_convert.mnn.compatibility import oldest_reader
    from sa3_convert.mnn.converter import mnn_from_onnx
    from sa3_convert.passes.hazards import refuse_hazards
    from sa3_convert.passes.pipeline import load_onnx

    chosen = o.open_recipe(recipe).for_component(component)
    target = target_for(chosen, target_mnn)
    refuse_hazards(load_onnx(source), target_mnn=target)
    given = None if input_file is None else read_arrays(input_file)
    found = []

    def verify(made: Path) -> None:
        found.append(verify_any(source, made, component, given=given))
        found[0].check_floor(chosen.floor_db if floor_db is None else floor_db)

    storage = mnn_from_onnx(source, out, chosen, target_mnn=target, check=verify)
    size, ratio = out.stat().st_size / 2**20, found[0].worst.signal_to_noise_db
    echo(f"{out}: {size:.2f} MiB, holds what {recipe} asks for; for {oldest_reader(storage)}; {ratio:.1f} dB")
