"""`inspect` and `table`: what a file holds, and bundles side by side."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import BundlesArgument, JsonOption, OfflineOption, brought, hub_origin, write_figures


def inspect(
    file: Annotated[
        Path,
        Argument(
            metavar="FILE.mnn",
            help="Any MNN model, or a bundle for all of its own; of the hub too.",
            callback=paths.reads,
        ),
    ],
    offline: OfflineOption = False,
    json_file: JsonOption = None,
) -> None:
    """Say what a .mnn file holds.

    Its inputs and outputs, and per operator the stored type, bits, block and bytes.
    """
    from sa3_convert.cli.console import stdout
    from sa3_convert.cli.inspection_tables import render_storage
    from sa3_convert.mnn.file.storage import read_storage

    file = brought(file, offline, ("mnn",))
    if file.is_dir():
        _inspect_bundle(file, json_file)
        return
    storage = read_storage(file)
    if json_file is not None:
        write_figures(json_file, json.loads(storage.to_json()))
    stdout.print(render_storage(storage))


def _inspect_bundle(folder: Path, json_file: Path | None) -> None:
    from sa3_convert.bundle.foreign import contradictions
    from sa3_convert.bundle.manifest import SLOTS_OF
    from sa3_convert.cli.console import open_told, stderr, stdout
    from sa3_convert.cli.inspection_tables import render_storage
    from sa3_convert.mnn.file.storage import read_storage

    bundle = open_told(folder)
    models = {
        str(a.component) + ("" if a.rank is None else f", slots of rank {a.rank}"): read_storage(
            bundle.file(a.component, a.kind)
        )
        for a in bundle.manifest.artifacts
        if a.kind in ("mnn", SLOTS_OF["mnn"])
    }
    told = {name: json.loads(storage.to_json()) for name, storage in models.items()}
    data = {"variant": bundle.manifest.label, "recipe": bundle.manifest.recipe, "models": told}
    write_figures(json_file, data | hub_origin(folder))
    for name, storage in models.items():
        stdout.print(f"{name}:")
        stdout.print(render_storage(storage))
        # Names of an export are slots, and its manifest says what they hold.
        for line in contradictions(storage.path.name, storage) if bundle.is_foreign else ():
            stderr.print(line)


def table(
    bundles: BundlesArgument,
    bench: Annotated[
        list[Path] | None, Option(metavar="FILE.json", help="Add times and memory of `bench --json`.")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Print sizes and fidelity of several bundles as Markdown."""
    from sa3_convert.bundle.table import Bench, markdown_table
    from sa3_convert.cli.console import open_told

    benches = [Bench.read(path) for path in bench or ()]
    echo(markdown_table([open_told(brought(path, offline, ())) for path in bundles], benches))
