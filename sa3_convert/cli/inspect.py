"""`inspect` and `table`: what a file holds, and bundles side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sa3_convert.cli.echo import echo

if TYPE_CHECKING:
    pass


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE.mnn", help="Any MNN model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a .mnn file holds: I/O, and per operator the stored type, bits, block and bytes."""
    from sa3_convert.cli.console import stdout
    from sa3_convert.cli.inspection_tables import render_storage as render
    from sa3_convert.mnn.file.storage import read_storage

    storage = read_storage(file)
    if as_json:
        echo(storage.to_json())
    else:
        stdout.print(render(storage))


def table(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE…", help="Folders that `convert` made.")],
    bench: Annotated[
        list[Path] | None, typer.Option("--bench", metavar="FILE.json", help="Add times and memory of `bench --json`.")
    ] = None,
) -> None:
    """Print size and fidelity of each component of several bundles as one Markdown table."""
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.bundle.table import Bench, markdown_table

    benches = [Bench.read(path) for path in bench or ()]
    echo(markdown_table([Bundle.open(path) for path in bundles], benches))
