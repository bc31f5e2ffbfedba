"""`verify`, `bisect`, `inspect` and `table`: what a bundle or file really is."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sa3_convert.cli.options import BundleArgument, ComponentOption, JsonFileOption, OneComponentOption, ThreadsOption


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (verify, bisect, inspect, table):
        app.command()(command)


def verify(
    bundle: BundleArgument,
    component: ComponentOption = None,
    json_file: JsonFileOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter inputs: what `convert` runs.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Compare every MNN model of a bundle with ONNX Runtime on its fp32 reference."""
    from sa3_convert.bundle.manifest import Bundle
    from sa3_convert.cli.console import show_verdict, stdout
    from sa3_convert.files import write_text
    from sa3_convert.verify.bundle import verify_bundle
    from sa3_convert.verify.table import render

    opened = Bundle.open(bundle)
    result = verify_bundle(opened, components=tuple(component or ()), quick=quick, threads=threads, report=show_verdict)
    stdout.print(render(result))
    if json_file is not None:
        write_text(json_file, json.dumps(result.to_data(), indent=2) + "\n")
    result.check()


def bisect(
    bundle: BundleArgument,
    component: OneComponentOption,
    input_file: Annotated[
        Path | None, typer.Option("--input", metavar="FILE.npz", help="Inputs by name, instead of sampled ones.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampled inputs; a verification names its cases'.")] = 0,
    latents: Annotated[int | None, typer.Option(min=1, help="T of the sampled inputs.")] = None,
    json_file: JsonFileOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Name the first operator where a model leaves its reference, with what surrounds it."""
    from sa3_convert.bundle.manifest import Bundle
    from sa3_convert.cli.console import stdout
    from sa3_convert.files import write_text
    from sa3_convert.verify.bisect_bundle import bisect_bundle, read_feeds
    from sa3_convert.verify.table import render_bisect

    opened = Bundle.open(bundle)
    feeds = None if input_file is None else read_feeds(input_file, component, opened.layout)
    result = bisect_bundle(opened, component, seed=seed, latents=latents, feeds=feeds, threads=threads)
    stdout.print(render_bisect(result))
    if json_file is not None:
        write_text(json_file, json.dumps(result.to_data(), indent=2) + "\n")


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE.mnn", help="Any MNN model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a .mnn file holds: I/O, and per operator the stored type, bits, block and bytes."""
    from sa3_convert.cli.console import stdout
    from sa3_convert.mnn.inspect import render
    from sa3_convert.mnn.storage import read_storage

    storage = read_storage(file)
    if as_json:
        typer.echo(storage.to_json())
    else:
        stdout.print(render(storage))


def table(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE…", help="Folders that `convert` made.")],
) -> None:
    """Print size and fidelity of each component of several bundles as one Markdown table."""
    from sa3_convert.bundle.manifest import Bundle
    from sa3_convert.bundle.table import markdown_table

    typer.echo(markdown_table([Bundle.open(path) for path in bundles]))
