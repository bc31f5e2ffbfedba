"""`convert`: a checkpoint into a bundle of verified models."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from sa3_convert.cli import options as o
from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo, echo_next
from sa3_convert.components import MOST_RANK, TEXT_TO_AUDIO
from sa3_convert.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from sa3_convert.convert.plan import ConvertRequest
    from sa3_convert.scheduling import Runner

_more, _how = o.panel("More in the bundle"), o.panel("How to work")

OutOption = Annotated[Path, Option(metavar="DIR", help="The bundle's folder.", callback=paths.makes)]
CacheOption = Annotated[Path | None, _how(metavar="DIR", help="Where stages are kept; beside --out.")]
ReferenceOption = Annotated[bool, _more("--with-reference", help="The reference ONNX, to verify it elsewhere.")]
OrtInt8Option = Annotated[
    bool | None,
    _more(
        "--with-ort-int8/--no-ort-int8",
        help="Models for `run --engine onnxruntime-int8`. When not given they are made where that engine is the "
        "fastest, of recipes that quantise.",
    ),
]
OnnxOption = Annotated[
    Literal["fp16"] | None, _more(help="ONNX models of this precision, for ONNX Runtime on NVIDIA GPUs.")
]
SplitDitOption = Annotated[bool, _more("--with-split-dit", help="The DiT in parts for `run --split-dit`.")]
SlotsOption = Annotated[
    int | None,
    _more(
        metavar="RANK",
        min=1,
        max=MOST_RANK,
        help="Models for `run --adapter`, which take LoRAs of up to this rank as inputs; 16 suits most.",
    ),
]
DryRunOption = Annotated[bool, _how("--dry-run", help="Print the recipe and the plan with sizes, and stop.")]
ForceOption = Annotated[bool, _how("--force", help="Redo everything; replace another bundle.")]


def convert(
    checkpoint: o.CheckpointArgument,
    out: OutOption,
    recipe: o.RecipeOption = o.DEFAULT_RECIPE,
    component: o.ComponentOption = None,
    lora: o.LoraOption = None,
    cache: CacheOption = None,
    with_reference: ReferenceOption = False,
    with_ort_int8: OrtInt8Option = None,
    with_onnx: OnnxOption = None,
    target_mnn: o.TargetOption = None,
    with_split_dit: SplitDitOption = False,
    adapter_slots: SlotsOption = None,
    threads: o.ThreadsOption = None,
    workers: o.WorkersOption = None,
    scheduler: o.SchedulerOption = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    json_file: o.JsonOption = None,
) -> None:
    """Convert a checkpoint into a bundle of verified MNN models.

    What is up to date is not redone.
    """
    runner = _runner(workers, scheduler, force=force)
    from sa3_convert.cli import console
    from sa3_convert.convert.plan import ConvertRequest, plan
    from sa3_convert.lab.doctor.results import check_conversion
    from sa3_convert.system.log import is_shown
    from sa3_convert.system.machine import integer_products

    resolved = o.open_recipe(recipe)
    opened = o.open_checkpoint(checkpoint, lora)
    request = ConvertRequest(
        checkpoint=opened,
        recipe=resolved,
        out=out,
        cache=o.cache_of(cache, out),
        components=tuple(component or ()),
        force=force,
        with_reference=with_reference,
        with_ort_int8=resolved.quantises and integer_products() is not None if with_ort_int8 is None else with_ort_int8,
        with_onnx=with_onnx,
        target_mnn=target_mnn,
        with_split_dit=with_split_dit,
        adapter_slots=adapter_slots,
        threads=threads,
    )
    console.stderr.print(f"{checkpoint}: {opened.variant_name}; recipe {resolved.name}: {resolved.description}")
    notes = [check_conversion(request.selected()), opened.tokenizer and opened.tokenizer.note]
    for note in filter(None, notes):
        console.stderr.print(f"Note: {note}")
    if dry_run or is_shown():
        console.stderr.print(resolved.to_yaml().rstrip(), style="dim")
    if dry_run:
        planned = plan(request)
        o.write_figures(json_file, console.plan_data(request, planned))
        console.stdout.print(console.plan_table(request, planned))
    else:
        _make(request, json_file, partial(_make_stages, request, runner, workers, lora or ()))


def _runner(workers: int | None, scheduler: str | None, *, force: bool) -> "Runner | None":
    runner = o.runner_on(workers, scheduler)
    if runner is not None and force:
        raise UsageError("--force redoes in this process what workers did. Leave --workers and --scheduler out.")
    return runner


def _make_stages(request: "ConvertRequest", runner: "Runner | None", workers: int | None, loras: Sequence[str]) -> None:
    """Make what is missing in the cache on workers, if there are any, several components at once."""
    if runner is None:
        return
    from sa3_convert.cli.console import show_stage
    from sa3_convert.convert.conversion import StageEvent
    from sa3_convert.lab.common import Common
    from sa3_convert.lab.sweep.tasks import make_on_workers
    from sa3_convert.scheduling import threads_each

    threads = request.threads or (workers and threads_each(workers))
    common = Common.of(request.checkpoint, request.cache, loras, threads=threads)
    make_on_workers(
        request,
        common,
        runner,
        lambda stages: echo(f"{stages} stages for workers; a line for each when it is done.", err=True),
        lambda task, seconds: show_stage(StageEvent(task.component, task.stage, "done", seconds)),
    )


def _make(request: "ConvertRequest", json_file: Path | None, on_workers: Callable[[], None]) -> None:
    from sa3_convert.cli import console
    from sa3_convert.convert.conversion import convert as make_bundle

    try:
        on_workers()
        outcome = make_bundle(request, console.show_stage, console.show_dropped)
    except VerificationError as error:
        without = " Models for onnxruntime-int8 are left out with --no-ort-int8." if request.with_ort_int8 else ""
        raise VerificationError(f"{error}{without}") from None
    made = {"variant": outcome.bundle.manifest.label, "recipe": request.recipe.name, "up_to_date": outcome.up_to_date}
    o.write_figures(json_file, made | {"models": console.bundle_rows(outcome.bundle)})
    console.stdout.print(console.bundle_table(outcome.bundle))
    if outcome.up_to_date:
        echo(f"{request.out} is up to date; nothing was done.")
    elif set(TEXT_TO_AUDIO) <= set(outcome.bundle.components):
        echo_next("run", str(request.out), "--prompt", "warm analog synth pad", "-o", "out.wav")
    elif request.checkpoint.layout.dit is None:
        echo_next("bundle", "export", str(request.out), "--to", f"{request.out}-published")
    else:
        echo_next("inspect", str(request.out))
