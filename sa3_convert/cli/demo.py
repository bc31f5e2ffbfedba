"""`make convert` without a checkpoint: toy checkpoints with seeded weights, converted, verified, and heard.

Shows every step of the real thing in about a minute. Random weights make noise, not music; what it proves is the path.
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from sa3_convert.cli.app import run as sa3_convert
from sa3_convert.cli.echo import echo

PROMPTS = {"small-music": "warm analog pad", "small-sfx": "footsteps on gravel"}
SECONDS = "3"


def demo(
    variants: Annotated[list[str], typer.Option()],
    recipes: Annotated[list[str], typer.Option()],
    folder: Annotated[Path, typer.Option()],
) -> None:
    """Convert toy checkpoints of `variants` with `recipes` into `folder`, and generate one WAV per bundle."""
    heard = []
    for variant in variants:
        checkpoint = folder / f"toy-{variant}"
        if not checkpoint.exists():
            _command("checkpoint", "synthesize", str(checkpoint), "--variant", variant, "--size", "toy")
        for recipe in recipes:
            bundle = folder / f"toy-{variant}-{recipe}"
            _command("convert", str(checkpoint), "--recipe", f"configs/{recipe}.yaml", "--out", str(bundle))
            wav = bundle.with_suffix(".wav")
            if not wav.exists() or wav.stat().st_mtime < (bundle / "manifest.json").stat().st_mtime:
                prompt = PROMPTS.get(variant, "rain on a tin roof")
                _command("run", str(bundle), "--prompt", prompt, "--seconds", SECONDS, "-o", str(wav))
            heard.append(wav)
    _farewell(echo, heard)


def _command(*arguments: str) -> None:
    echo(f"\n$ sa3-convert {shlex.join(arguments)}", err=True)
    code = sa3_convert(list(arguments))
    if code:
        raise typer.Exit(code)


def _farewell(say: Callable[[str], None], heard: Sequence[Path]) -> None:
    say("\nThe toy checkpoints have random weights, so what they make is noise; the path is the real one.")
    say("Listen to: " + ", ".join(str(wav) for wav in heard))
    say("A real checkpoint (accept its licence on the hub first):")
    say("  .venv/bin/sa3-convert checkpoint fetch stabilityai/stable-audio-3-small-music artifacts/small-music")
    say("  make convert CHECKPOINT=artifacts/small-music RECIPE=configs/int8.yaml")


if __name__ == "__main__":
    typer.run(demo)
