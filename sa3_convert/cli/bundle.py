"""`sa3-convert bundle …`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import BundlesArgument, brought
from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    from sa3_convert.bundle.manifest import ArtifactKind, Manifest
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.publish.measured import ReadReport

ReportsOption = Annotated[
    list[Path] | None,
    Option("--report", metavar="REPORT.json", help="Say what `verify --report` found; several.", callback=paths.reads),
]
BenchesOption = Annotated[
    list[Path] | None,
    Option("--bench", metavar="FILE.json", help="Say what `bench --json` measured; several.", callback=paths.reads),
]
OrtInt8Option = Annotated[bool, Option("--with-ort-int8", help="Also the models of the engine onnxruntime-int8.")]
SlotsOption = Annotated[bool, Option("--with-adapter-slots", help="Also the models that take LoRAs as inputs.")]
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
    with_ort_int8: OrtInt8Option = False,
    with_adapter_slots: SlotsOption = False,
    force: Annotated[bool, Option("--force", help="Replace an earlier export, unless it is up to date.")] = False,
) -> None:
    """Write bundles as existing clients read them, with manifests, hashes, licences and a model card."""
    from sa3_convert.publish.contract import golden_of
    from sa3_convert.publish.export import Card, export_bundles
    from sa3_convert.publish.measured import read_benches, read_reports

    told = Card(read_reports(report or ()), read_benches(bench or ()), name, drawn)
    opened = _opened(bundles)
    forms = _forms(with_ort_int8, with_adapter_slots)
    made = export_bundles(opened, to, layout, force=force, forms=forms, golden=golden_of, card=told)
    for line in made.left_out:
        echo(line, err=True)
    for path, (_, entry) in sorted(made.files.items()):
        echo(f"{entry.sha256[:16]}  {entry.bytes / 2**20:9.2f} MiB  {path}")
    if made.up_to_date:
        echo(f"{to} is up to date; nothing was done.")


def publish(
    bundles: BundlesArgument,
    to: Annotated[str, Option(metavar="ORG/NAME", help="The repository; it is made if it is not there.")],
    private: Annotated[bool, Option("--private", help="Make it a private one, or refuse a public one.")] = False,
    create_pr: Annotated[bool, Option("--create-pr", help="As a pull request, to a repository that is there.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show files and card, without a network, and stop.")] = False,
    allow: Annotated[
        list[str] | None,
        Option(
            metavar="synthetic|lora", help="Also publish random weights, or LoRAs that are in the weights; several."
        ),
    ] = None,
    report: ReportsOption = None,
    bench: BenchesOption = None,
    with_ort_int8: OrtInt8Option = False,
    with_adapter_slots: SlotsOption = False,
) -> None:
    """Publish bundles on the hub: the tree of `bundle export` in one commit, which is then held to what was meant."""
    from sa3_convert.cli.console import stderr
    from sa3_convert.hub.files import is_repository
    from sa3_convert.publish import hub
    from sa3_convert.publish.contract import golden_of
    from sa3_convert.publish.export import Card, planned_export
    from sa3_convert.publish.measured import read_benches, read_reports

    if not is_repository(to):
        raise UsageError(f"--to {to!r} is no hub id; give ORG/NAME.")
    opened = _opened(bundles)
    hub.require_publishable(opened, allow or ())
    told = Card(read_reports(report or ()), read_benches(bench or ()), to, drawn)
    planned = planned_export(opened, "hub", golden_of, told, forms=_forms(with_ort_int8, with_adapter_slots))
    sizes = {path: entry.bytes for path, (_, entry) in planned.files.items()}
    sizes |= {path: len(text) for path, text in planned.texts.items()}
    for line in planned.left_out:
        echo(line, err=True)
    for path, size in sorted(sizes.items()):
        echo(f"{size / 2**20:9.2f} MiB  {path}", err=not dry_run)
    stderr.print(f"{to}: {len(sizes)} files, {sum(sizes.values()) / 2**20:.2f} MiB")
    if dry_run:
        echo(f"\n{planned.texts['README.md'].decode()}")
        return
    with hub.bars(shown=stderr.is_terminal and not stderr.quiet):
        pinned, request = hub.publish(planned, to, private=private, create_pr=create_pr)
    echo(str(pinned))
    if request is not None:
        stderr.print(f"It is pull request {request} there, to be merged.")
    hub.check_published(planned, pinned, stderr.print)


def card(
    bundles: BundlesArgument,
    out: Annotated[
        Path, Option("--out", "-o", metavar="README.md", help="The card; its picture beside it.", callback=paths.writes)
    ],
    report: ReportsOption = None,
    bench: BenchesOption = None,
    selftest: Annotated[
        list[Path] | None,
        Option(
            metavar="FILE.json",
            help="Say what `selftest --json` found, with random weights in the same shapes; several.",
            callback=paths.reads,
        ),
    ] = None,
    name: NameOption = None,
) -> None:
    """Write a model card: what was measured, stored and converted, and nothing else."""
    from sa3_convert.publish.card import card as text_of
    from sa3_convert.publish.card import placed
    from sa3_convert.publish.measured import SelfTest, read_benches, read_reports
    from sa3_convert.system.files import atomic_path, write_text
    from sa3_convert.system.streams import is_stream

    reports, benches = read_reports(report or ()), read_benches(bench or ())
    manifests = placed(_opened(bundles))
    selftests = [SelfTest.read(path, manifests) for path in selftest or ()]
    text = text_of(manifests, reports, benches, selftests, name=name)
    picture = None if is_stream(out) else drawn(manifests, reports)
    if picture is not None:
        beside = out.with_suffix(".png")
        with atomic_path(beside) as file:
            file.write_bytes(picture)
        text = text_of(manifests, reports, benches, selftests, name=name, picture=beside.name)
    write_text(out, text)


def _forms(ort_int8: bool, slots: bool) -> "list[ArtifactKind]":
    from sa3_convert.publish.export import ORT_INT8, SLOTS

    return [form for form, wanted in ((ORT_INT8, ort_int8), (SLOTS, slots)) if wanted]


def _opened(bundles: Sequence[Path]) -> "list[Bundle]":
    from sa3_convert.bundle.reader import Bundle

    return [Bundle.open(brought(path, offline=False)) for path in bundles]


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
