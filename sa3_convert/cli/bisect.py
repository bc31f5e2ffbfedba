"""`bisect`: the first operator at fault."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sa3_convert.cli import verify_options as o
from sa3_convert.cli.options import BundleArgument, JsonFileOption, OneComponentOption, ThreadsOption
from sa3_convert.cli.paths import reads
from sa3_convert.components import Component
from sa3_convert.errors import UsageError

if TYPE_CHECKING:
    from sa3_convert.arrays import Arrays
    from sa3_convert.bundle.reader import Bundle


def bisect(
    bundle: BundleArgument,
    component: OneComponentOption,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE.npz", help="Inputs by name, instead of sampled ones.", callback=reads),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampled inputs; a verification names its cases'.")] = 0,
    latents: Annotated[int | None, typer.Option(min=1, help="T of the sampled inputs.")] = None,
    case: o.CaseOption = None,
    step: o.StepOption = None,
    case_steps: o.CaseStepsOption = 8,
    backend: o.BackendOption = "cpu",
    against: o.AgainstOption = None,
    references: o.ReferencesOption = None,
    json_file: JsonFileOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Name the first operator where a model leaves its reference, with what surrounds it."""
    if input_file is not None and case is not None:
        raise UsageError("--input and --case both say what the model is run with; give one of them.")
    if case is None and (step is not None or references is not None):
        raise UsageError("--step and --references belong to a case of a generation; add --case.")
    from sa3_convert.bundle.reader import Bundle
    from sa3_convert.cli.comparison_tables import render_against, render_bisect
    from sa3_convert.cli.console import stdout
    from sa3_convert.lab.bisect.bisect import bisect_bundle, bisect_bundle_against, read_feeds
    from sa3_convert.lab.bisect.runtimes import Runtime
    from sa3_convert.system.files import write_text

    opened = Bundle.open(bundle)
    feeds: Arrays | None = None
    if input_file is not None:
        feeds = read_feeds(input_file, component, opened.layout)
    elif case is not None:
        feeds = _feeds_of(opened, component, case, step, steps=case_steps, references=references, threads=threads)
    how: dict[str, Any] = {"seed": seed, "latents": latents, "feeds": feeds}
    if against is None:
        found = bisect_bundle(opened, component, threads=threads, backend=backend, **how)
        data, shown = found.to_data(), render_bisect(found)
    else:
        sides = Runtime(backend, threads=threads), Runtime.parse(against)
        compared = bisect_bundle_against(opened, component, *sides, **how)
        data, shown = compared.to_data(), render_against(compared)
    if json_file is not None:
        write_text(json_file, json.dumps(data, indent=2) + "\n")
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
    from sa3_convert.lab.generations.cases import GenerationCase
    from sa3_convert.lab.generations.end_to_end import default_references, staged_pipelines
    from sa3_convert.lab.generations.trajectory import case_feeds

    store = ReferenceStore(references or default_references(bundle))
    with staged_pipelines(bundle, store=store, steps=steps, threads=threads) as (kept, _):
        return case_feeds(kept, component, GenerationCase.parse(case), step)
