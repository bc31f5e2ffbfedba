"""`plan`: from a size or a fidelity to a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from sa3_convert.cli.conversion import DEFAULT_RECIPE, RecipeOption
from sa3_convert.cli.options import (
    CheckpointArgument,
    LoraOption,
    OneComponentOption,
    ThreadsOption,
    open_checkpoint,
)
from sa3_convert.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command()(plan)


def plan(
    checkpoint: CheckpointArgument,
    component: OneComponentOption,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.yaml", help="The recipe to write.")],
    target_mib: Annotated[float | None, typer.Option("--target-mib", min=0.01, help="Size of the model.")] = None,
    min_snr: Annotated[float | None, typer.Option("--min-snr", help="Fidelity of the model, in dB.")] = None,
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
    from sa3_convert.cli.console import planned_table, stderr, stdout
    from sa3_convert.files import write_text
    from sa3_convert.quantise.planner import Target, layers_to_measure, measure, plan_component
    from sa3_convert.recipe import load_recipe

    base = load_recipe(recipe)
    opened = open_checkpoint(checkpoint, lora)
    folder = cache or out.absolute().parent / ".sa3-convert-cache"
    if dry_run:
        layers = layers_to_measure(opened, component)
        typer.echo(f"{component.value}: {len(layers)} layers would be measured; the results are kept in {folder}.")
        return
    with stderr.status(f"{component.value}: preparing") as status:
        sensitivity = measure(
            opened,
            component,
            folder,
            lambda what, done, total: status.update(
                f"{component.value}: {what} {done}" + (f" of {total}" if total else "")
            ),
            threads,
        )
    target = Target(size=None if target_mib is None else round(target_mib * 2**20), snr_db=min_snr)
    made = plan_component(opened, component, base.for_component(component), sensitivity, target)
    changed = base.model_copy(
        update={
            "name": out.stem.lower(),
            "description": f"Planned for {component.value}: {_asked(target_mib, min_snr)}.",
            "components": dict(base.components) | {component: made.recipe},
        }
    )
    write_text(out, changed.to_yaml())
    stdout.print(planned_table(component, made))
    typer.echo(f"{out}: predicted {made.predicted_db:.1f} dB; no plan of this size is above {made.bound_db:.1f} dB.")
    loras = "".join(f" --lora {text}" for text in lora or ())
    typer.echo(f"Next: sa3-convert convert {checkpoint}{loras} --recipe {out} --out {out.with_suffix('')}")


def _asked(target_mib: float | None, min_snr: float | None) -> str:
    return f"at most {target_mib:g} MiB" if target_mib is not None else f"at least {min_snr:g} dB"
