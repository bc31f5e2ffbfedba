"""`plan`: from a size or a fidelity to a recipe."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from sa3_convert.bundle.overlap import require_apart
from sa3_convert.cli import options as o
from sa3_convert.cli import paths
from sa3_convert.cli.echo import echo, echo_next
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.system.streams import is_stream

if TYPE_CHECKING:
    from sa3_convert.lab.common import Common
    from sa3_convert.lab.planner.measuring import Part
    from sa3_convert.lab.planner.planner import Target
    from sa3_convert.lab.planner.sensitivity import Sensitivity
    from sa3_convert.recipe import ScaleType
    from sa3_convert.scheduling import Runner

OutOption = Annotated[
    Path, Option(metavar="FILE.yaml", help="The recipe; - is standard output.", callback=paths.writes)
]
SizeOption = Annotated[float | None, Option(min=0.01, help="Size of the model.")]
FidelityOption = Annotated[float | None, Option(min=0, help="Fidelity of the model, in dB.")]
ByOption = Annotated[
    Literal["layer", "role"],
    Option(help="What gets one precision: each layer, or all layers of a name but for its numbers."),
]
ScalesOption = Annotated[Literal["fp16", "fp32"], Option(help="Type of scales and minima.")]
CacheOption = Annotated[Path | None, Option(metavar="DIR", help="Where measurements are kept; beside --out.")]


def plan(
    checkpoint: o.CheckpointArgument,
    component: o.OneComponentOption,
    out: OutOption,
    target_mib: SizeOption = None,
    min_snr: FidelityOption = None,
    by: ByOption = "layer",
    scales: ScalesOption = "fp16",
    recipe: o.RecipeOption = o.DEFAULT_RECIPE,
    lora: o.LoraOption = None,
    workers: o.WorkersOption = None,
    scheduler: o.SchedulerOption = None,
    cache: CacheOption = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be measured, and stop.")] = False,
    json_file: o.JsonOption = None,
    threads: o.ThreadsOption = None,
) -> None:
    """Write a recipe that gives each layer the precision it needs.

    Each layer's sensitivity is measured, and the best precisions are chosen for a size or a fidelity.
    """
    target = _target(target_mib, min_snr)
    runner = o.runner_on(workers, scheduler)
    from sa3_convert.cli.console import planned_rows, planned_table, stdout
    from sa3_convert.lab.common import Common
    from sa3_convert.lab.planner.measuring import CASES, layers_to_measure, to_measure
    from sa3_convert.lab.planner.planner import plan_component
    from sa3_convert.recipe import recipe_file
    from sa3_convert.system.files import write_text

    # Also where a name stands for one of the project's own.
    require_apart([("--out", out)], [("--recipe", recipe_file(recipe))])
    base = o.open_recipe(recipe)
    opened = o.open_checkpoint(checkpoint, lora)
    folder = o.cache_of(cache, out)
    common = Common.of(opened, folder, lora, threads=threads)
    if dry_run:
        layers, passes = layers_to_measure(opened, component), len(CASES[component])
        o.write_figures(json_file, {"component": component, "layers": list(layers), "passes": passes})
        echo(f"{component.value}: {len(layers)} layers would be measured in {passes} backward passes.")
        tell_measuring(to_measure(common, component, scales), workers or 1)
        echo(f"The results are kept in {folder}.")
        return
    sensitivity = measured(common, component, scales, runner)
    made = plan_component(opened, component, base.for_component(component), sensitivity, target, by)
    changed = {
        "name": re.sub("[^a-z0-9._-]+", "-", out.stem.lower()).lstrip("._-")[:100] or "planned",
        "description": f"Planned for {component.value}: {_asked(target_mib, min_snr)}.",
        "components": dict(base.components) | {component: made.recipe},
    }
    write_text(out, base.model_copy(update=changed).to_yaml())
    figures = {"component": component, "bytes": made.size, "predicted_db": made.predicted_db, "bound_db": made.bound_db}
    o.write_figures(json_file, figures | {"precisions": planned_rows(made)})
    stdout.print(planned_table(component, made))
    echo(f"{out}: predicted {made.predicted_db:.1f} dB; no plan of this size is above {made.bound_db:.1f} dB.")
    if not is_stream(out):
        loras = (word for text in lora or () for word in ("--lora", text))
        folder = out.with_suffix("") if out.suffix else out.with_name(f"{out.name}-bundle")
        echo_next("convert", checkpoint, *loras, "--recipe", str(out), "--out", str(folder))


def measured(
    common: "Common", component: Component, scales: "ScaleType", runner: "Runner | None" = None
) -> "Sensitivity":
    """Return a component's sensitivities, and show how far measuring is; `runner` is of workers, None is none."""
    from sa3_convert.cli.console import progress
    from sa3_convert.lab.planner.measuring import measure
    from sa3_convert.scheduling import in_this_process

    name = component.value
    with progress(f"{name}: preparing") as tick:

        def told(what: str, done: int, of: int) -> None:
            tick(f"{name}: {what}", done, of)

        return measure(common, component, scales, told, runner or in_this_process)


def tell_measuring(parts: "Sequence[Part]", workers: int) -> None:
    """Say how long what is left to measure takes."""
    from sa3_convert.scheduling import simulated

    if parts:
        minutes = simulated(parts, workers).seconds / 60
        echo(f"Measuring what rounding costs: {len(parts)} parts, about {minutes:.1f} min.")
    else:
        echo("What rounding costs was measured before.")


def _target(target_mib: float | None, min_snr: float | None) -> "Target":
    if (target_mib is None) == (min_snr is None):
        raise UsageError("Give either --target-mib or --min-snr.")
    size = None if target_mib is None else target_mib * 2**20
    if not math.isfinite(size or min_snr or 0):
        raise UsageError("--target-mib and --min-snr are finite numbers, and a size fits into one in bytes.")
    from sa3_convert.lab.planner.planner import Target

    return Target(size=None if size is None else round(size), snr_db=min_snr)


def _asked(target_mib: float | None, min_snr: float | None) -> str:
    return f"at most {target_mib:g} MiB" if target_mib is not None else f"at least {min_snr:g} dB"
