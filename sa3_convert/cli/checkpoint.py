"""`sa3-convert checkpoint …`."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from sa3_convert.cli.echo import echo
from sa3_convert.cli.paths import makes


def synthesize(
    folder: Annotated[
        Path, Argument(metavar="DIR", help="Where to write; must not exist or be empty.", callback=makes)
    ],
    variant: Annotated[str, Option(help="small-music, small-sfx, medium, or one with -base.")] = "small-music",
    size: Annotated[Literal["toy", "full"], Option(help="toy: a few MB; full: the published shapes.")] = "toy",
    seed: Annotated[int, Option(min=0, help="Seed of the weights.")] = 0,
    weights: Annotated[Literal["gaussian", "heavy-tailed"], Option(help="Distribution of the weights.")] = "gaussian",
) -> None:
    """Write a checkpoint of the published format, of random weights."""
    from sa3_convert.checkpoint.synthetic import synthesize as write
    from sa3_convert.cli.console import transfer

    with transfer("writing") as progress:
        write(folder, variant, size, seed, weights, progress)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    echo(f"{folder}: {variant} at {size} size, seed {seed}, {weights} weights, {total / 2**20:.1f} MiB")


def train_miniature(
    folder: Annotated[
        Path, Argument(metavar="DIR", help="Where to work; goes on where it was stopped.", callback=makes)
    ],
    quick: Annotated[bool, Option("--quick", help="A few steps, to see that it works.")] = False,
    seed: Annotated[int, Option(min=0, max=1 << 20, help="Seed of weights, sounds and captions.")] = 0,
) -> None:
    """Train the very small model that makes simple sounds, on two cores."""
    from sa3_convert.cli.console import progress, stderr
    from sa3_convert.lab.miniature.train import BASE, FEW_STEPS, QUICK, WHOLE, train

    with progress("training") as tick:

        def report(what: str, done: int, total: int, loss: float, left: float) -> None:
            tick(what, done, total)
            stderr.print(f"{what} {done}/{total}: loss {loss:.4f}, {timedelta(seconds=round(left))} left")

        train(folder, QUICK if quick else WHOLE, seed=seed, report=report)
    echo(f"{folder / FEW_STEPS} (for few steps), {folder / BASE}: convert and run them like any checkpoint")


def fetch(
    hub_id: Annotated[str, Argument(metavar="HUB_ID", help="For example stabilityai/stable-audio-3-small-music.")],
    folder: Annotated[Path, Argument(metavar="DIR", help="Where to put it.", callback=makes)],
    revision: Annotated[str | None, Option(help="Commit to download; the pinned one when not given.")] = None,
) -> None:
    """Download a published checkpoint; a broken download resumes."""
    from sa3_convert.checkpoint.hub import fetch as download
    from sa3_convert.cli.console import stderr, transfer

    with transfer("downloading") as progress:
        fetched = download(hub_id, folder, revision, progress, stderr.print)
    echo(f"{folder}: {fetched.hub_id} at {fetched.revision}, {fetched.nbytes / 2**20:.1f} MiB")
