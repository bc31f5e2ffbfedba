"""`bisect`: the first operator at fault."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from sa3_convert.cli import options as o
from sa3_convert.cli import paths
from sa3_convert.components import Component
from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    from sa3_convert.arrays import Arrays
    from sa3_convert.bundle.reader import Bundle

_case = o.panel("Inputs of a generation")


def bisect(
    bundle: o.BundleArgument,
    component: o.OneComponentOption,
    input_file: Annotated[
        Path | None,
        Option("--input", metavar="FILE.npz", help="Inputs by name, instead of sampled ones.", callback=paths.reads),
    ] = None,
    seed: Annotated[int, Option(min=0, help="Of the sampled inputs; a verification names its cases'.")] = 0,
    latents: Annotated[int | None, Option(min=1, help="T of the sampled inputs.")] = None,
    case: Annotated[str | None, _case(metavar=o.CASE, help="One that `verify --full` names.")] = None,
    step: Annotated[int | None, _case(min=0, help="For the DiT: which denoising step, from 0.")] = None,
    steps: Annotated[int, _case(min=1, max=1000, help="How many there are.")] = 8,
    references: o.ReferencesOption = None,
    backend: o.BackendOption = "cpu",
    against: Annotated[
        str | None,
        Option(
            metavar="RUNTIME",
            help="Compare with the same file run otherwise, not with its reference: cpu, or cpu,memory=low,threads=1.",
        ),
    ] = None,
    offline: o.OfflineOption = False,
    json_file: o.JsonOption = None,
    threads: o.ThreadsOption = None,
) -> None:
    """Name the first operator where a model leaves its reference."""
    if input_file is not None and case is not None:
        raise UsageError("--input and --case both say what the model is run with; give one of them.")
    if case is None and (step is not None or references is not None):
        raise UsageError("--step and --references belong to a case of a generation; add --case.")
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.cli.comparison_tables import render_against, render_bisect
    from sa3_convert.cli.console import stdout
    from sa3_convert.lab.bisect.bisect import bisect_bundle, bisect_bundle_against, read_feeds
    from sa3_convert.lab.bisect.runtimes import Runtime

    opened = Bundle.open(o.brought(bundle, offline))
    feeds: Arrays | None = None
    if input_file is not None:
        feeds = read_feeds(input_file, component, opened.layout)
    elif case is not None:
        feeds = _feeds_of(opened, component, case, step, steps=steps, references=references, threads=threads)
    how: dict[str, Any] = {"seed": seed, "latents": latents, "feeds": feeds}
    if against is None:
        found = bisect_bundle(opened, component, threads=threads, backend=backend, **how)
        data, shown = found.to_data(), render_bisect(found)
    else:
        sides = Runtime(backend, threads=threads), Runtime.parse(against)
        compared = bisect_bundle_against(opened, component, *sides, **how)
        data, shown = compared.to_data(), render_against(compared)
    o.write_figures(json_file, data)
    stdout.print(shown)


def _feeds_of(
    bundle: "Bundle",
    component: Component,
    case: str,
    step: int | None,
    *,
    steps: int,
    references: Path | None,
    threads: int | None,
) -> "Arrays":
    """Return what a component is run with in a generation."""
    from sa3_convert.check.reference_store import ReferenceStore
    from sa3_convert.lab.generations.end_to_end import default_references, staged_pipelines
    from sa3_convert.lab.generations.trajectory import GenerationCase, case_feeds

    store = ReferenceStore(references or default_references(bundle))
    with staged_pipelines(bundle, store=store, steps=steps, threads=threads) as (kept, _):
        return case_feeds(kept, component, GenerationCase.parse(case), step)
