"""`sa3-convert bundle …`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import BundlesArgument

if TYPE_CHECKING:
    from sa3_convert.bundle.manifest import Manifest
    from sa3_convert.publish.measured import ReadReport

ReportsOption = Annotated[
    list[Path] | None,
    Option("--report", metavar="REPORT.json", help="Say what `verify --report` found; several.", callback=paths.reads),
]
BenchesOption = Annotated[
    list[Path] | None,
    Option("--bench", metavar="FILE.json", help="Say what `bench --json` measured; several.", callback=paths.reads),
]
NameOption = Annotated[str | None, Option(metavar="OWNER/NAME", help="Hub id that the files will have.")]


def export(
    bundles: BundlesArgument,
    to: Annotated[
        Path, Option(metavar="DIR", help="Where to write; must not exist or be empty.", callback=paths.makes)
    ],
    layout: Annotated[
        Literal["hub", "flat"],
        Option(help="hub: the published tree; flat: a folder per bundle, with the names that its client opens."),
    ] = "hub",
    report: ReportsOption = None,
    bench: BenchesOption = None,
    name: NameOption = None,
    force: Annotated[bool, Option("--force", help="Replace an earlier export, unless it is up to date.")] = False,
) -> None:
    """Write bundles as existing clients read them, with manifests, hashes, licences and a model card."""
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.publish.contract import golden_of
    from sa3_convert.publish.export import Card, export_bundles
    from sa3_convert.publish.measured import read_benches, read_reports

    told = Card(read_reports(report or ()), read_benches(bench or ()), name, drawn)
    opened = [Bundle.open(path) for path in bundles]
    made = export_bundles(opened, to, layout, force=force, golden=golden_of, card=told)
    for line in made.left_out:
        echo(line, err=True)
    for path, (_, entry) in sorted(made.files.items()):
        echo(f"{entry.sha256[:16]}  {entry.bytes / 2**20:9.2f} MiB  {path}")
    if made.up_to_date:
        echo(f"{to} is up to date; nothing was done.")


def card(
    bundles: BundlesArgument,
    out: Annotated[
        Path, Option("--out", "-o", metavar="README.md", help="The card; its picture beside it.", callback=paths.writes)
    ],
    report: ReportsOption = None,
    bench: BenchesOption = None,
    name: NameOption = None,
) -> None:
    """Write a model card: what was measured, stored and converted, and nothing else."""
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.publish.card import card as text_of
    from sa3_convert.publish.card import placed
    from sa3_convert.publish.measured import read_benches, read_reports
    from sa3_convert.system.files import atomic_path, write_text
    from sa3_convert.system.streams import is_stream

    reports, benches = read_reports(report or ()), read_benches(bench or ())
    manifests = placed([Bundle.open(path) for path in bundles])
    text = text_of(manifests, reports, benches, name=name)
    picture = None if is_stream(out) else drawn(manifests, reports)
    if picture is not None:
        beside = out.with_suffix(".png")
        with atomic_path(beside) as file:
            file.write_bytes(picture)
        text = text_of(manifests, reports, benches, name=name, picture=beside.name)
    write_text(out, text)


def drawn(manifests: "Mapping[str, Manifest]", reports: "Sequence[ReadReport]") -> bytes | None:
    """Return a card's picture as PNG; None without figures, or without the packages that draw, which is told."""
    from sa3_convert.publish.card import dots

    if not (found := dots(manifests, reports)):
        return None
    try:
        from sa3_convert.lab.report.figures import sizes_figure
    except ImportError as error:
        echo(f"The card has no picture: {error}. The extra `lab` brings what draws it.", err=True)
        return None
    return sizes_figure(found)
