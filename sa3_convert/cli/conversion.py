"""`convert` and its stages one at a time: `export`, `fuse`, `mnn`."""

from pathlib import Path
from typing import Annotated

import typer

from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import (
    CheckpointArgument,
    ComponentOption,
    LoraOption,
    OneComponentOption,
    ThreadsOption,
    open_checkpoint,
    open_recipe,
)
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.mnn.target import MnnVersion, target_for

RecipeOption = Annotated[
    Path,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="How to store each component: a file, or the name of one of ours.",
        callback=paths.reads,
    ),
]
TargetOption = Annotated[
    MnnVersion | None,
    typer.Option(
        "--target-mnn",
        help="The oldest MNN that the models must be right on; when not given, the oldest that can read what the "
        "recipe stores.",
    ),
]
DEFAULT_RECIPE = Path("configs/int8.yaml")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (convert, export, fuse, mnn):
        app.command()(command)


def convert(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The bundle's folder.", callback=paths.makes)],
    recipe: RecipeOption = DEFAULT_RECIPE,
    component: ComponentOption = None,
    lora: LoraOption = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Where stages are kept; beside --out when not given.")
    ] = None,
    with_reference: Annotated[
        bool, typer.Option("--with-reference", help="Copy the reference ONNX into the bundle, to verify it elsewhere.")
    ] = False,
    with_ort_int8: Annotated[
        bool, typer.Option("--with-ort-int8", help="Also quantise for `run --engine onnxruntime-int8`.")
    ] = False,
    target_mnn: TargetOption = None,
    with_split_dit: Annotated[
        bool, typer.Option("--with-split-dit", help="Also make the DiT in two parts for `run --split-dit`.")
    ] = False,
    threads: ThreadsOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan with sizes and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Redo everything; replace another bundle.")] = False,
) -> None:
    """Convert a checkpoint into a bundle of verified MNN models. What is up to date is not redone."""
    from sa3_convert.cli.console import bundle_table, dropped, plan_table, show_stage, stderr, stdout
    from sa3_convert.convert import convert as make_bundle
    from sa3_convert.doctor.consult import check_conversion
    from sa3_convert.plan import Plan, plan
    from sa3_convert.request import ConvertRequest
    from sa3_convert.stage_cache import cache_beside

    resolved = open_recipe(recipe)
    request = ConvertRequest(
        checkpoint=open_checkpoint(checkpoint, lora),
        recipe=resolved,
        out=out,
        cache=cache or cache_beside(out),
        components=tuple(component or ()),
        force=force,
        with_reference=with_reference,
        with_ort_int8=with_ort_int8,
        target_mnn=target_mnn,
        with_split_dit=with_split_dit,
        threads=threads,
    )
    stderr.print(f"{checkpoint}: {request.checkpoint.variant_name}; recipe {resolved.name}: {resolved.description}")
    if note := check_conversion(request.selected()):
        stderr.print(f"Note: {note}")
    if dry_run:
        stdout.print(plan_table(request, plan(request)))
        return

    def show(plan: Plan) -> None:
        if plan.dropped:
            stderr.print(f"Left out of the bundle from now on: {', '.join(dropped(plan))}.")
        if any(step.todo for step in plan.steps):
            stderr.print(resolved.to_yaml().rstrip(), style="dim")

    outcome = make_bundle(request, show_stage, show)
    stdout.print(bundle_table(outcome.bundle))
    if outcome.up_to_date:
        echo(f"{out} is up to date; nothing was done.")
    elif request.checkpoint.layout.dit is None:
        echo(f"Next: sa3-convert bundle export {out} --to DIR --layout flat")
    else:
        echo(f'Next: sa3-convert run {out} --prompt "warm analog synth pad" --seconds 10 -o out.wav')


def export(
    checkpoint: CheckpointArgument,
    component: OneComponentOption,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.onnx", help="The reference ONNX.", callback=paths.writes_model)
    ],
    lora: LoraOption = None,
    inputs_embeds: Annotated[
        bool,
        typer.Option("--inputs-embeds", help="Of text_encoder: take rows of its table and a float mask, no integers."),
    ] = False,
) -> None:
    """Stage 1: a component's network as fp32 ONNX, weights beside it in FILE.onnx.data."""
    if inputs_embeds and component is not Component.TEXT_ENCODER:
        raise UsageError("--inputs-embeds is for --component text_encoder.")
    from sa3_convert.components import contract
    from sa3_convert.export.component import export_component
    from sa3_convert.export.embedded_text_encoder import export_embedded_text_encoder

    opened = open_checkpoint(checkpoint, lora)
    contract(component, opened.layout)
    opened.check_values(component)
    if inputs_embeds:
        export_embedded_text_encoder(opened, out)
    else:
        export_component(opened, component, out)
    echo(f"{out}: {component.value} of {checkpoint}")


def fuse(
    reference: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="What `export` wrote.", callback=paths.reads)],
    component: OneComponentOption,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.onnx", help="The ONNX for MNN.", callback=paths.writes_model)
    ],
    recipe: RecipeOption = DEFAULT_RECIPE,
    target_mnn: TargetOption = None,
) -> None:
    """Stage 2: the passes that make an ONNX safe for MNN, and the hazard lint."""
    from sa3_convert.passes.pipeline import onnx_for_mnn

    chosen = open_recipe(recipe).for_component(component)
    report = onnx_for_mnn(reference, out, component, chosen, target_mnn=target_for(chosen, target_mnn))
    for name, count in report.counts().items():
        echo(f"{name:<24} {count}")
    echo(f"{out}: no hazards")


def mnn(
    source: Annotated[
        Path,
        typer.Argument(metavar="FILE.onnx", help="What `fuse` wrote, or another graph.", callback=paths.reads),
    ],
    component: OneComponentOption,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.mnn", help="The model.", callback=paths.writes_model)],
    recipe: RecipeOption = DEFAULT_RECIPE,
    target_mnn: TargetOption = None,
    floor_db: Annotated[
        float | None,
        typer.Option("--floor-db", min=0, help="Least ratio against ONNX Runtime; the recipe's when not given."),
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE.npz",
            help="Inputs by name to compare with, instead of made-up ones.",
            callback=paths.reads,
        ),
    ] = None,
) -> None:
    """Stage 3: the hazard lint, and MNN's converter, judged by its file and by ONNX Runtime's outputs."""
    from sa3_convert.mnn.convert import mnn_from_onnx
    from sa3_convert.mnn.readers import oldest_reader
    from sa3_convert.passes.hazards import refuse_hazards
    from sa3_convert.passes.pipeline import load_onnx
    from sa3_convert.verify.any_graph import verify_any
    from sa3_convert.verify.bisect_bundle import read_arrays

    chosen = open_recipe(recipe).for_component(component)
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
