"""`doctor`: what is installed, what is really there, and what this MNN gets wrong."""

from typing import Annotated, Literal

import typer

from sa3_convert.cli.echo import echo
from sa3_convert.cli.options import JsonOption, write_figures


def doctor(
    backend: Annotated[
        Literal["cpu", "cuda", "opencl", "vulkan"], typer.Option("--backend", help="Probe this.")
    ] = "cpu",
    everything: Annotated[bool, typer.Option("--all", help="List the probes that work, too.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Say what is installed and present, and probe what MNN gets wrong here; `convert` and `run` read the result."""
    from sa3_convert.cli.console import stderr, stdout
    from sa3_convert.cli.inspection_tables import render_diagnosis as render
    from sa3_convert.cli.inspection_tables import summary, surroundings_lines
    from sa3_convert.system.machine import surroundings

    for line in surroundings_lines(surroundings()):
        echo(line)
    from sa3_convert.lab.doctor.examine import diagnose
    from sa3_convert.lab.doctor.results import save

    with stderr.status("probing") as status:
        found = diagnose(backend, lambda done, total: status.update(f"probing {backend}: {done} of {total}"))
    path = save(found)
    write_figures(json_file, found.to_data())
    stdout.print(render(found, everything=everything))
    for line in summary(found):
        echo(line)
    echo(f"Kept in {path}")
