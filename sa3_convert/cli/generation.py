"""`run`: prompts to audio."""

from pathlib import Path
from typing import Annotated

import typer

from sa3_convert.cli.options import BundleArgument, ThreadsOption


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(run)


def run(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="What to generate.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.wav", help="Where to write the audio.")],
    seconds: Annotated[float, typer.Option(help="Duration.")] = 10.0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Denoising steps; the model's own default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same start noise everywhere.")] = 0,
    threads: ThreadsOption = None,
) -> None:
    """Generate audio from a text prompt."""
    raise NotImplementedError
