"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sa3_convert.cli import paths
from sa3_convert.components import Component

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint
    from sa3_convert.recipe import Recipe

CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", help="Folder of a checkpoint, or a hub id that was fetched before.", callback=paths.opens
    ),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:STRENGTH]",
        help="LoRA (.safetensors) to merge into the weights; 1 is its full strength. Several are applied in order.",
        callback=paths.reads,
    ),
]
BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder that `convert` made.", callback=paths.opens)
]
ComponentOption = Annotated[
    list[Component] | None, typer.Option("--component", help="Only this component; may be given several times.")
]
OneComponentOption = Annotated[Component, typer.Option("--component", help="The component.")]
JsonFileOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write the figures as JSON; - is standard output, and tables then go to standard error.",
        callback=paths.writes,
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=256, help="Threads; all cores when not given.")
]


def open_recipe(recipe: Path) -> "Recipe":
    """Read the recipe that the user named, by path or by the name of one of ours.

    Raises:
        RecipeError: it is not there, or not valid.

    """
    from sa3_convert.recipe import load_recipe
    from sa3_convert.recipe_files import recipe_file

    return load_recipe(recipe_file(recipe))


def open_checkpoint(checkpoint: str, loras: list[str] | None) -> "Checkpoint":
    """Open what the user named, with its LoRAs; what these change is listed on stderr.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
        UsageError: a LoRA's strength is no number, or a LoRA is given twice.

    """
    from sa3_convert.checkpoint.lora_file import LoraRequest
    from sa3_convert.checkpoint.reader import Checkpoint, resolve_checkpoint

    requests = [LoraRequest.parse(text) for text in loras or ()]
    opened = Checkpoint.open(resolve_checkpoint(checkpoint)).with_loras(requests)
    if opened.loras:
        from sa3_convert.cli.console import lora_table, stderr

        for lora in opened.loras:
            stderr.print(lora_table(lora))
    return opened
