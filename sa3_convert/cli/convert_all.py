"""`make convert`: every checkpoint with every recipe into verified bundles, and these into one published tree.

Without a checkpoint it is shown on toys with seeded weights, which are also heard. They make noise, not music; what
they prove is the path.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sa3_convert.cli.app import run as sa3_convert
from sa3_convert.cli.echo import echo

PROMPTS = {"small-music": "warm analog pad", "small-sfx": "footsteps on gravel"}
SECONDS = "3"
PUBLISHED = "published"


def convert_all(
    folder: Annotated[Path, typer.Option()],
    recipe: Annotated[list[str], typer.Option()],
    checkpoints: Annotated[list[str] | None, typer.Argument(metavar="DIR[:RECIPE,…]…")] = None,
    toy: Annotated[list[str] | None, typer.Option()] = None,
) -> None:
    """Convert checkpoints into `folder`, with all recipes or their own, and toys of some variants; publish the bundles.

    A second time only what has changed is done.
    """
    bundles = []
    for word in checkpoints or ():
        # A folder's own name may have a colon: on Windows that of its drive.
        whole = ":" not in word or Path(word).is_dir()
        checkpoint, _, own = (word, "", "") if whole else word.rpartition(":")
        bundles += [_converted(checkpoint, name, folder) for name in (own.split(",") if own else recipe)]
    for variant in toy or ():
        checkpoint = str(folder / f"toy-{variant}")
        if not Path(checkpoint).exists():
            _command("checkpoint", "synthesize", checkpoint, "--variant", variant, "--size", "toy")
        made = [_converted(checkpoint, name, folder) for name in recipe]
        bundles += made
        for bundle in made:
            _heard(bundle, PROMPTS.get(variant, "rain on a tin roof"))
    published = str(folder / PUBLISHED)
    _command("bundle", "export", *map(str, bundles), "--to", published, "--force")
    echo(f"\nReady to be published: {published}. Bundles: {', '.join(map(str, bundles))}.")
    if toy:
        _farewell(bundles)


def _converted(checkpoint: str, recipe: str, folder: Path) -> Path:
    bundle = folder / f"{Path(checkpoint).name}-{Path(recipe).stem}"
    _command("convert", checkpoint, "--recipe", recipe, "--out", str(bundle))
    return bundle


def _heard(bundle: Path, prompt: str) -> None:
    wav = bundle.with_suffix(".wav")
    if not wav.exists() or wav.stat().st_mtime < (bundle / "manifest.json").stat().st_mtime:
        _command("run", str(bundle), "--prompt", prompt, "--seconds", SECONDS, "-o", str(wav), "--force")


def _command(*arguments: str) -> None:
    echo(f"\n$ sa3-convert {shlex.join(arguments)}", err=True)
    code = sa3_convert(list(arguments))
    if code:
        raise typer.Exit(code)


def _farewell(bundles: Sequence[Path]) -> None:
    echo("\nThe toy checkpoints have random weights, so what they make is noise; the path is the real one.")
    echo("Listen to: " + ", ".join(str(bundle.with_suffix(".wav")) for bundle in bundles))
    echo("A real checkpoint (accept its licence on the hub first):")
    echo("  .venv/bin/sa3-convert checkpoint fetch stabilityai/stable-audio-3-small-music artifacts/small-music")
    echo('  make convert CHECKPOINT=artifacts/small-music RECIPE="int8 fp16"')


if __name__ == "__main__":
    typer.run(convert_all)
