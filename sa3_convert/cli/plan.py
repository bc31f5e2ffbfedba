"""`plan`: from a size or a fidelity to a recipe."""

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import (
    DEFAULT_RECIPE,
    CheckpointArgument,
    LoraOption,
    OneComponentOption,
    RecipeOption,
    ThreadsOption,
    open_checkpoint,
    open_recipe,
)
from sa3_convert.cli.paths import writes
from sa3_convert.errors import UsageError


def plan(
    checkpoint: CheckpointArgument,
    component: OneComponentOption,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE.yaml", help="The recipe to write; - is standard output.", callback=writes),
    ],
    target_mib: Annotated[float | None, typer.Option("--target-mib", min=0.01, help="Size of the model.")] = None,
    min_snr: Annotated[float | None, typer.Option("--min-snr", help="Fidelity of the model, in dB.")] = None,
    by: Annotated[
        Literal["layer", "role"],
        typer.Option("--by", help="What gets one precision: each layer, or all layers of a name but for its numbers."),
    ] = "layer",
    scales: Annotated[Literal["fp16", "fp32"], typer.Option("--scales", help="Type of scales and minima.")] = "fp16",
    recipe: RecipeOption = DEFAULT_RECIPE,
    lora: LoraOption = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Where measurements are kept; beside --out.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured, and stop.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Choose each layer's precision by its measured sensitivity, for a size or a fidelity; write a recipe."""
    if (target_mib is None) == (min_snr is None):
        raise UsageError("Give either --target-mib or --min-snr.")
    if not math.isfinite(target_mib or min_snr or 0):
        raise UsageError("--target-mib and --min-snr are finite numbers.")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sa3_convert.cli.console import planned_table, stderr, stdout
    from sa3_convert.cli.paths import require_apart
    from sa3_convert.lab.planner.planner import Target, layers_to_measure, measure, passes_to_run, plan_component
    from sa3_convert.recipe import recipe_file
    from sa3_convert.system.files import write_text

    # Also where a name stands for one of the project's own.
    require_apart([("--out", out)], [("--recipe", recipe_file(recipe))])
    base = open_recipe(recipe)
    opened = open_checkpoint(checkpoint, lora)
    folder = cache or out.absolute().parent / ".sa3-convert-cache"
    if dry_run:
        layers = layers_to_measure(opened, component)
        echo(
            f"{component.value}: {len(layers)} layers would be measured in {passes_to_run(component)} backward passes; "
            f"the results are kept in {folder}."
        )
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(f"{component.value}: preparing", total=None)

        def tick(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{component.value}: {what}", completed=done, total=total)

        sensitivity = measure(opened, component, scales, folder, tick, threads)
    target = Target(size=None if target_mib is None else round(target_mib * 2**20), snr_db=min_snr)
    made = plan_component(opened, component, base.for_component(component), sensitivity, target, by)
    changed = base.model_copy(
        update={
            "name": re.sub("[^a-z0-9._-]+", "-", out.stem.lower()).lstrip("._-")[:100] or "planned",
            "description": f"Planned for {component.value}: {_asked(target_mib, min_snr)}.",
            "components": dict(base.components) | {component: made.recipe},
        }
    )
    write_text(out, changed.to_yaml())
    stdout.print(planned_table(component, made))
    echo(f"{out}: predicted {made.predicted_db:.1f} dB; no plan of this size is above {made.bound_db:.1f} dB.")
    loras = "".join(f" --lora {text}" for text in lora or ())
    echo(f"Next: sa3-convert convert {checkpoint}{loras} --recipe {out} --out {out.with_suffix('')}")


def _asked(target_mib: float | None, min_snr: float | None) -> str:
    return f"at most {target_mib:g} MiB" if target_mib is not None else f"at least {min_snr:g} dB"
