"""`make convert`: every checkpoint with every recipe into verified bundles, and these into one published tree.

The miniature, the very small trained model that comes with this package, is also heard.
"""

import shlex
from pathlib import Path
from typing import Annotated, Final

import typer

from sa3_convert.checkpoint.variants import MINIATURE
from sa3_convert.cli.app import run as sa3_convert
from sa3_convert.cli.echo import echo

SOUNDS: Final = {
    "chord": "a plucked C major chord",
    "drum": "a loud snare drum at 130 bpm, on the left",
    "siren": "a siren on the right",
}
"""What the miniature is asked for, by what the WAV is called."""
PUBLISHED: Final = "published"


def convert_all(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CHECKPOINT[:RECIPE,…]…")],
    folder: Annotated[Path, typer.Option()],
    recipe: Annotated[list[str], typer.Option()],
) -> None:
    """Convert checkpoints into `folder`, with all recipes or their own, and publish the bundles.

    A second time only what has changed is done.
    """
    bundles, heard = [], []
    for word in checkpoints:
        # A folder's own name may have a colon: on Windows that of its drive.
        whole = ":" not in word or Path(word).is_dir()
        checkpoint, _, own = (word, "", "") if whole else word.rpartition(":")
        made = [_converted(checkpoint, name, folder) for name in (own.split(",") if own else recipe)]
        bundles += made
        if checkpoint == MINIATURE:
            heard += [_heard(bundle, name, prompt) for bundle in made for name, prompt in SOUNDS.items()]
    published = str(folder / PUBLISHED)
    _command("bundle", "export", *map(str, bundles), "--to", published, "--force")
    echo(f"\nReady to be published: {published}. Bundles: {', '.join(map(str, bundles))}.")
    if heard:
        _farewell(heard, bundles[0])


def _converted(checkpoint: str, recipe: str, folder: Path) -> Path:
    bundle = folder / f"{Path(checkpoint).name}-{Path(recipe).stem}"
    _command("convert", checkpoint, "--recipe", recipe, "--out", str(bundle))
    return bundle


def _heard(bundle: Path, name: str, prompt: str) -> str:
    """Generate a sound unless that was done since the bundle was made, and return what to say of it."""
    wav = bundle.with_name(f"{bundle.name}-{name}.wav")
    if not wav.exists() or wav.stat().st_mtime < (bundle / "manifest.json").stat().st_mtime:
        _command("run", str(bundle), "--prompt", prompt, "-o", str(wav), "--force")
    return f"  {wav}  {prompt}"


def _command(*arguments: str) -> None:
    echo(f"\n$ sa3-convert {shlex.join(arguments)}", err=True)
    code = sa3_convert(list(arguments))
    if code:
        raise typer.Exit(code)


def _farewell(heard: list[str], bundle: Path) -> None:
    echo("\nListen to:")
    for line in heard:
        echo(line)
    echo("They are of the miniature, a very small model of simple sounds. Another one of them:")
    echo(f'  .venv/bin/sa3-convert run {bundle} --prompt "a kick drum at 92 bpm" -o {bundle}-other.wav')
    echo("A real checkpoint (accept its licence on the hub first):")
    echo("  .venv/bin/sa3-convert checkpoint fetch stabilityai/stable-audio-3-small-music artifacts/small-music")
    echo('  make convert CHECKPOINT=artifacts/small-music RECIPE="int8 fp16"')


if __name__ == "__main__":
    typer.run(convert_all)
