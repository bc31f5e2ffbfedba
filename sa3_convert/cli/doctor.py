"""`doctor`: what this MNN gets wrong, what is installed, and what is really there."""

from typing import Annotated, Literal

import typer

from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import JsonOption, write_figures


def doctor(
    backend: Annotated[
        Literal["cpu", "cuda", "opencl", "vulkan"], typer.Option("--backend", help="Probe this.")
    ] = "cpu",
    probes: Annotated[bool, typer.Option("--probes", help="List the probes that do not just work.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="List every probe.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Say whether MNN is sound here for the converted models, and what is installed and present.

    Small models are probed; `convert` and `run` read the result.
    """
    from sa3_convert.cli.console import progress, stdout
    from sa3_convert.cli.inspection_tables import probe_table, surroundings_lines, verdict_lines
    from sa3_convert.lab.doctor.examine import diagnose
    from sa3_convert.lab.doctor.results import save

    with progress(f"probing {backend}") as tick:
        found = diagnose(backend, lambda done, total: tick(f"probing {backend}", done, total))
    write_figures(json_file, found.to_data())
    for line in (*verdict_lines(found), "", *surroundings_lines(found.surroundings)):
        echo(line)
    if probes or everything:
        stdout.print(probe_table(found, everything=everything))
    else:
        echo("\n`--probes` lists what does not work and what is done about it.")
    echo(f"Kept in {save(found)}")
