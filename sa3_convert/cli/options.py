"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from sa3_convert.components import Component

CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint, or a hub id that was fetched before.")
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `convert` made.")]
ComponentOption = Annotated[
    list[Component] | None, typer.Option("--component", help="Only this component; may be given several times.")
]
OneComponentOption = Annotated[Component, typer.Option("--component", help="The component.")]
JsonFileOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=256, help="Threads; all cores when not given.")
]
