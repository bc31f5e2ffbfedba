"""What a conversion will do, how much room it needs, and whether there is enough of it: known before any long work."""

import math
import shutil
from dataclasses import dataclass

from sa3_convert.bundle.manifest import MANIFEST, Bundle
from sa3_convert.components import TOKEN_TABLE, Component
from sa3_convert.errors import BundleError, InputError
from sa3_convert.estimate import Estimate, available_memory, estimate
from sa3_convert.recipe import ComponentRecipe
from sa3_convert.request import ConvertRequest
from sa3_convert.stage_cache import StageCache
from sa3_convert.stages import Keys, Stage


@dataclass(frozen=True, slots=True)
class Step:
    """One component's part of the plan."""

    component: Component
    keys: Keys
    todo: tuple[Stage, ...]
    """Stages that have to run; empty when the bundle has it already."""
    reference_bytes: int
    model_bytes: int
    """Estimated from the tensors' shapes."""
    takes: Estimate


def estimate_model_bytes(shapes: dict[str, tuple[int, ...]], recipe: ComponentRecipe) -> int:
    """Return the expected size of a `.mnn`: payload of the weights, and scales and offsets of the quantised ones."""
    total = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        if name == TOKEN_TABLE:
            total += recipe.table_bytes(shape[0], shape[1])
        elif recipe.weights is not None and len(shape) >= 2 and min(shape[:2]) > 1:
            bits_of_layer, block = recipe.weights.for_layer(name.removesuffix(".weight"))
            if bits_of_layer is None:
                total += count * recipe.float_bytes
            else:
                groups = shape[0] * (1 if block is None else max(1, shape[1] // block))
                numbers = groups * (1 if recipe.weights.symmetric else 2)
                total += count * bits_of_layer // 8 + numbers * (2 if recipe.weights.scales == "fp16" else 4)
        else:
            total += count * recipe.float_bytes
    return total


def plan(request: ConvertRequest) -> list[Step]:
    """Return what has to be done for each component, by manifest and cache; `convert` reads the files themselves.

    Raises:
        InputError: disk or memory do not have room for it.

    """
    cache = StageCache(request.cache)
    steps = []
    for component in request.selected():
        recipe = request.recipe.for_component(component)
        keys = request.keys(component)
        shapes = {name: entry.shape for name, entry in request.checkpoint.stored(component).items()}
        todo = _todo(request, cache, component, keys)
        reference_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
        steps.append(
            Step(
                component=component,
                keys=keys,
                todo=todo,
                reference_bytes=reference_bytes,
                model_bytes=estimate_model_bytes(shapes, recipe),
                takes=estimate(todo, reference_bytes, recipe),
            )
        )
    _require_room(request, steps)
    _require_memory(steps)
    return steps


def _todo(request: ConvertRequest, cache: StageCache, component: Component, keys: Keys) -> tuple[Stage, ...]:
    if request.force:
        return tuple(stage for stage, _ in keys.in_order())
    if (request.out / MANIFEST).exists():
        try:
            bundle = Bundle.open(request.out)
            bundle.check((component,), contents=False)
            int8 = keys.ort_int8 is None or bundle.artifact(component, "onnx-int8").fingerprint == keys.ort_int8
            split = keys.split is None or bundle.artifact(component, "mnn-step").fingerprint == keys.split
            if int8 and split and bundle.artifact(component).fingerprint == keys.verify:
                return ()
        except BundleError:
            pass
    return tuple(stage for stage, key in keys.in_order() if not cache.has(stage, key))


def bytes_needed(steps: list[Step]) -> int:
    """Return the temporary and lasting room that a plan takes at its peak."""
    lasting = sum(
        # The integer form has a quarter of the reference's weights, but all of its token table.
        s.reference_bytes * (("export" in s.todo) + ("ort-int8" in s.todo))
        + s.model_bytes * (("mnn" in s.todo) + ("split" in s.todo))
        for s in steps
    )
    # While one component is converted, its rewritten ONNX and the converter's scratch file with all weights exist too;
    # of one in two parts, also those parts.
    passing = max(
        ((2 + ("split" in s.todo)) * s.reference_bytes for s in steps if {"mnn", "ort-int8", "split"} & set(s.todo)),
        default=0,
    )
    return lasting + passing


def _require_room(request: ConvertRequest, steps: list[Step]) -> None:
    folder = request.cache
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = bytes_needed(steps)
    if needed > free:
        raise InputError(
            f"Not enough room in {folder}: this conversion needs about {needed / 2**20:.1f} MiB "
            f"and {free / 2**20:.1f} MiB are free. Free some, or give --cache and --out on another disk."
        )


def _require_memory(steps: list[Step]) -> None:
    free = available_memory()
    for step in steps:
        needed = step.takes.memory_bytes
        if free is not None and needed > free:
            raise InputError(
                f"Not enough memory: converting {step.component.value} needs about {needed / 2**30:.1f} GiB and "
                f"{free / 2**30:.1f} GiB are free. End other programs, add swap, or leave it out with --component."
            )
