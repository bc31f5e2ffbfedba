"""`selftest`: everything that is installed here, tried on a device."""

from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import JsonOption, write_figures

if TYPE_CHECKING:
    from rich.table import Table

    from sa3_convert.lab.selftest import SelfTest


def selftest(
    device: Annotated[Literal["cpu", "cuda"], Option("--device", help="Where.")] = "cpu",
    full: Annotated[
        bool, Option("--full", help="True-size models with random weights, up to 120 s of audio: needs 21 GB of disk.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Try every installed engine on this machine.

    Seeded models are made, converted, compared with float32 on the CPU and with what the reference implementation gave,
    timed, and MNN is probed. The JSON file is what to attach to a report, and what `bundle card --selftest` reads.
    """
    import tempfile
    from pathlib import Path

    from sa3_convert.cli.bench import bench_table
    from sa3_convert.cli.console import progress, stdout
    from sa3_convert.cli.inspection_tables import surroundings_lines, verdict_lines
    from sa3_convert.lab.selftest import selftest as test
    from sa3_convert.lab.selftest import told_ahead
    from sa3_convert.system.files import partial_folder

    echo(told_ahead(device, full=full), err=True)
    with progress("self-test") as tick, partial_folder(Path(tempfile.gettempdir()) / "sa3-selftest") as folder:
        found = test(device, folder, full=full, say=lambda what: tick(what, 0, None))
    write_figures(json_file, found.to_data())
    for line in surroundings_lines(found.surroundings):
        echo(line)
    for name, why in found.absent.items():
        echo(f"{name} is not tried: {why}")
    if found.golden:
        stdout.print(golden_table(found))
    stdout.print(findings_table(found))
    for duration in dict.fromkeys(row.duration for row in found.rows):
        stdout.print(bench_table([row for row in found.rows if row.duration == duration], f"{duration:g} s of audio"))
    if found.diagnosis is not None:
        for line in verdict_lines(found.diagnosis):
            echo(line)
    echo(f"\n{found.verdict()} ({found.seconds:.0f} s)")
    found.check()


def findings_table(found: "SelfTest") -> "Table":
    """Return signal-to-noise ratios against float32 on the CPU: a row per engine, a column per component."""
    from sa3_convert.cli.console import grid

    columns = tuple(dict.fromkeys(finding.what for finding in found.findings))
    short = {"text_encoder": "T5", "number_conditioner": "NC", "dit": "DiT"}
    table = grid("dB against float32 on the CPU", ("engine",), tuple(short.get(name, name) for name in columns))
    for engine in dict.fromkeys(finding.engine for finding in found.findings):
        own = {finding.what: finding for finding in found.findings if finding.engine == engine}
        table.add_row(engine, *("failed" if (db := own[name].worst_db) is None else f"{db:.1f}" for name in columns))
    return table


def golden_table(found: "SelfTest") -> "Table":
    """Return the largest differences from what the reference implementation gave: a row per case."""
    from sa3_convert.cli.console import grid

    engines = tuple(dict.fromkeys(one.engine for one in found.golden))
    told = {(one.what, one.engine): "failed" if one.of_peak is None else f"{one.of_peak:.1e}" for one in found.golden}
    table = grid("Largest difference from the reference implementation, in parts of its peak", ("case",), engines)
    for what in dict.fromkeys(one.what for one in found.golden):
        table.add_row(what, *(told.get((what, engine), "") for engine in engines))
    return table
