"""`convert` and its stages one at a time: `export`, `fuse`, `mnn`."""

from pathlib import Path
from typing import Annotated

import typer

from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import (
    DEFAULT_RECIPE,
    CheckpointArgument,
    ComponentOption,
    LoraOption,
    RecipeOption,
    TargetOption,
    ThreadsOption,
    open_checkpoint,
    open_recipe,
)


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
    from sa3_convert.convert.cache import cache_beside
    from sa3_convert.convert.conversion import convert as make_bundle
    from sa3_convert.convert.plan import ConversionPlan, ConvertRequest, plan
    from sa3_convert.lab.doctor.results import check_conversion

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

    def show(plan: ConversionPlan) -> None:
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
