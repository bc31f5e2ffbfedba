"""`sa3-convert bundle …`."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import BundlesArgument
from sa3_convert.cli.paths import makes


def export(
    bundles: BundlesArgument,
    to: Annotated[Path, Option(metavar="DIR", help="Where to write; must not exist or be empty.", callback=makes)],
    layout: Annotated[
        Literal["hub", "flat"], Option(help="hub: the published tree; flat: the folder that clients read.")
    ] = "hub",
) -> None:
    """Write bundles under the names that existing clients read."""
    from sa3_convert.bundle.published import export_bundles
    from sa3_convert.bundle.reader import Bundle

    for file in export_bundles([Bundle.open(path) for path in bundles], to, layout):
        echo(f"{file.entry.sha256[:16]}  {file.entry.bytes / 2**20:9.2f} MiB  {file.path}")
