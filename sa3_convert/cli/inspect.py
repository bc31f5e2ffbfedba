"""`inspect` and `table`: what a file holds, and bundles side by side."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import BundlesArgument, JsonOption, write_figures


def inspect(
    file: Annotated[Path, Argument(metavar="FILE.mnn", help="Any MNN model.", callback=paths.reads)],
    json_file: JsonOption = None,
) -> None:
    """Say what a .mnn file holds.

    Its inputs and outputs, and per operator the stored type, bits, block and bytes.
    """
    from sa3_convert.cli.console import stdout
    from sa3_convert.cli.inspection_tables import render_storage
    from sa3_convert.mnn.file.storage import read_storage

    storage = read_storage(file)
    if json_file is not None:
        write_figures(json_file, json.loads(storage.to_json()))
    stdout.print(render_storage(storage))


def table(
    bundles: BundlesArgument,
    bench: Annotated[
        list[Path] | None, Option(metavar="FILE.json", help="Add times and memory of `bench --json`.")
    ] = None,
) -> None:
    """Print sizes and fidelity of several bundles as Markdown."""
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.bundle.table import Bench, markdown_table

    benches = [Bench.read(path) for path in bench or ()]
    echo(markdown_table([Bundle.open(path) for path in bundles], benches))
