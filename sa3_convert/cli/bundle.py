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
        Literal["hub", "flat"],
        Option(help="hub: the published tree; flat: a folder per bundle, with the names that its client opens."),
    ] = "hub",
    force: Annotated[bool, Option("--force", help="Replace an earlier export, unless it is up to date.")] = False,
) -> None:
    """Write bundles as existing clients read them, with manifests, hashes and licences."""
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.publish.contract import golden_of
    from sa3_convert.publish.export import export_bundles

    made = export_bundles([Bundle.open(path) for path in bundles], to, layout, force=force, golden=golden_of)
    for line in made.left_out:
        echo(line, err=True)
    for path, (_, entry) in sorted(made.files.items()):
        echo(f"{entry.sha256[:16]}  {entry.bytes / 2**20:9.2f} MiB  {path}")
    if made.up_to_date:
        echo(f"{to} is up to date; nothing was done.")
