"""What a conversion will do, decided before anything is made: which stages, how long, how much memory."""

import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sa3_convert.bundle.manifest import SPLIT_KINDS, Artifact, ArtifactKind
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import TOKEN_TABLE, Component
from sa3_convert.convert.cache import CachedResult, StageCache
from sa3_convert.convert.existing import (
    RESULTS,
    SHARED,
    existing_bundle,
    is_current,
    is_right,
    is_right_shared,
    of_other_weights,
)
from sa3_convert.convert.stages import INPUTS, NOTES, ConvertRequest, Keys, Stage
from sa3_convert.errors import InputError
from sa3_convert.recipe import ComponentRecipe

_GIB: Final = 2**30
_PROC: Final = Path("/proc/meminfo")
_GROUP: Final = Path("/sys/fs/cgroup")
_LEAST_MEMORY: Final = 0.6
"""GiB of a process with torch and ONNX Runtime in it and a toy to convert."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What a stage takes, as `start` + `per_gib` · GiB of reference."""

    seconds_per_gib: float
    memory_per_gib: float
    """GiB, not counting pages of mapped files, which the system takes back when it needs them."""
    start_seconds: float = 1.0
    start_memory: float = 1.0
    """Of true-size components; toys take less."""

    def memory(self, gib: float) -> float:
        """Return GiB for a reference of `gib`."""
        return min(self.start_memory, _LEAST_MEMORY + 4 * gib) + self.memory_per_gib * gib


_RATES: Final[Mapping[Stage, Rate]] = {
    "export": Rate(23, 0.4, start_seconds=10),
    "round": Rate(170, 1.2, start_memory=3.4),
    "mnn": Rate(18, 0.3),
    "verify": Rate(10, 1.1, start_memory=1.5),
    "ort-int8": Rate(20, 1.5),
    "split": Rate(40, 1.1, start_seconds=4, start_memory=1.5),
}
_PLANNED_SECONDS_PER_GIB: Final = 27
"""What rounding by least squares adds to the mnn stage."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one component, or of all."""

    seconds: float
    memory_bytes: int
    """At the most, in one process."""


def estimate(stages: Iterable[Stage], reference_bytes: int, recipe: ComponentRecipe) -> Estimate:
    """Return what some stages of a component will take.

    Args:
        stages: those that have to run.
        reference_bytes: of its float32 reference.
        recipe: how it will be stored.

    """
    size = reference_bytes / _GIB
    rates = {stage: _RATES[stage] for stage in stages}
    seconds = sum(rate.start_seconds + rate.seconds_per_gib * size for rate in rates.values())
    if "mnn" in rates and recipe.weights is not None and recipe.weights.rounding == "least_squares":
        seconds += _PLANNED_SECONDS_PER_GIB * size
    memory = max((rate.memory(size) for rate in rates.values()), default=0.0)
    return Estimate(seconds, round(memory * _GIB))


def total(estimates: Iterable[Estimate]) -> Estimate:
    """Return what components take one after the other."""
    found = list(estimates)
    return Estimate(sum(one.seconds for one in found), max((one.memory_bytes for one in found), default=0))


def available_memory(meminfo: Path = _PROC, group: Path = _GROUP) -> int | None:
    """Return how much memory a process can still get, swap included, or None where the system does not tell.

    Args:
        meminfo: Linux's description of the machine's memory.
        group: folder of the control group, whose limit counts too.

    """
    found = _fields(meminfo)
    if "MemAvailable" not in found:
        return None
    free = found["MemAvailable"] + found.get("SwapFree", 0)
    limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return free
    return min(free, max(0, limit - used))


def _fields(meminfo: Path) -> dict[str, int]:
    """Return bytes by name."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = (line.replace(":", " ").split() for line in lines)
    return {words[0]: int(words[1]) * 1024 for words in pairs if len(words) > 1 and words[1].isdigit()}


def _number(file: Path) -> int | None:
    """Return a control group's number; None for `max` and where there is none."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None


@dataclass(frozen=True, slots=True)
class Step:
    """One component's part of the plan."""

    component: Component
    keys: Keys
    todo: tuple[Stage, ...]
    """Stages that have to run."""
    place: tuple[ArtifactKind, ...]
    """Files that the bundle gets, or that its manifest says where to find, from the results of stages."""
    found: Mapping[Stage, CachedResult[Any]]
    """Results of the cache that this needs."""
    reference_bytes: int
    model_bytes: int
    """Estimated from the tensors' shapes."""
    placed_bytes: int
    """Of what is put into the bundle, at the most."""
    takes: Estimate


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a conversion will do."""

    existing: Bundle | None
    """The bundle that is completed, if one stands there."""
    steps: tuple[Step, ...]
    kept: tuple[Artifact, ...]
    """Files that stay as they are, of components that are not converted too."""
    dropped: tuple[Artifact, ...]
    """Files of the bundle that are not its own any more: of other weights, or extras that nobody asks for."""
    shared: tuple[ArtifactKind, ...]
    """Files for all components that are written."""
    up_to_date: bool
    """Whether there is nothing to do at all."""


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


def plan(request: ConvertRequest) -> Plan:
    """Return what has to be done. What stays of the components, or is used, was read and has its hash; nothing changes.

    Extras that the bundle has stay without being asked for, as long as they are what would be made now.

    Raises:
        UsageError: something else stands at `out`, or components of other weights would stay in it.
        InputError: disk or memory do not have room for it.

    """
    existing = existing_bundle(request)
    keys = {component: request.keys(component) for component in request.selected()}
    kept = _kept(request, existing, keys)
    steps = tuple(_step(request, component, keys[component], kept) for component in keys)
    _require_room(request, steps)
    _require_memory(steps)
    stays = {(artifact.component, artifact.kind) for artifact in kept}
    shared = tuple(kind for kind in _shared(request) if (None, kind) not in stays)
    placed = {(step.component, kind) for step in steps for kind in step.place} | {(None, kind) for kind in shared}
    listed = existing.manifest.artifacts if existing else ()
    dropped = tuple(artifact for artifact in listed if (artifact.component, artifact.kind) not in stays | placed)
    done = existing is not None and not placed and not dropped and is_current(existing, request)
    return Plan(existing, steps, kept, dropped, shared, up_to_date=done)


def _kept(request: ConvertRequest, existing: Bundle | None, keys: Mapping[Component, Keys]) -> tuple[Artifact, ...]:
    if existing is None:
        return ()
    others = of_other_weights(existing, request)
    kept = []
    for artifact in existing.manifest.artifacts:
        if artifact.component is None:
            stays = not request.force and is_right_shared(existing, artifact, request)
        elif artifact.component in keys:
            stays = not request.force and is_right(existing, artifact, request, keys[artifact.component])
        else:
            stays = artifact.component not in others
        if stays:
            kept.append(artifact)
    return tuple(kept)


def _shared(request: ConvertRequest) -> Collection[ArtifactKind]:
    return [kind for kind in SHARED if kind != "tokenizer" or request.checkpoint.layout.text_encoder is not None]


def _step(request: ConvertRequest, component: Component, keys: Keys, kept: Collection[Artifact]) -> Step:
    have = {artifact.kind for artifact in kept if artifact.component is component}
    place = tuple(kind for kind in request.kinds(component) if kind not in have)
    todo, found = _stages(request, keys, place)
    recipe = request.recipe.for_component(component)
    shapes = {name: entry.shape for name, entry in request.checkpoint.stored(component).items()}
    reference_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
    model_bytes = estimate_model_bytes(shapes, recipe)
    # Two parts have the weights of one model between them.
    sizes = {"mnn": model_bytes} | dict.fromkeys(SPLIT_KINDS, model_bytes // 2)
    if request.with_reference:
        sizes |= {"onnx": reference_bytes, "onnx-int8": reference_bytes}
    return Step(
        component=component,
        keys=keys,
        todo=todo,
        place=place,
        found=found,
        reference_bytes=reference_bytes,
        model_bytes=model_bytes,
        placed_bytes=sum(sizes.get(kind, 0) for kind in place),
        takes=estimate(todo, reference_bytes, recipe),
    )


def _stages(
    request: ConvertRequest, keys: Keys, place: Collection[ArtifactKind]
) -> tuple[tuple[Stage, ...], dict[Stage, CachedResult[Any]]]:
    """Return the stages that have to run for some files, and the results of the cache that they and the files need."""
    cache = StageCache(request.cache)
    needed = {stage for kind in place for stage in RESULTS[kind]}
    todo: list[Stage] = []
    found: dict[Stage, CachedResult[Any]] = {}
    for stage in reversed(tuple(keys)):
        if stage not in needed:
            continue
        result = None if request.force else cache.find(stage, keys[stage], NOTES[stage])
        if result is None:
            todo.insert(0, stage)
            needed.update(INPUTS[stage])
        else:
            found[stage] = result
    return tuple(todo), found


def bytes_needed(steps: Sequence[Step]) -> int:
    """Return the temporary and lasting room that a plan takes at its peak."""
    lasting = sum(
        # The integer form has a quarter of the reference's weights, but all of its token table.
        s.reference_bytes * (("export" in s.todo) + ("ort-int8" in s.todo))
        + s.model_bytes * (("mnn" in s.todo) + ("split" in s.todo))
        + s.placed_bytes
        for s in steps
    )
    # While one component is converted, its rewritten ONNX and the converter's scratch file with all weights exist too;
    # of one in two parts, also those parts.
    passing = max(
        ((2 + ("split" in s.todo)) * s.reference_bytes for s in steps if {"mnn", "ort-int8", "split"} & set(s.todo)),
        default=0,
    )
    return lasting + passing


def _require_room(request: ConvertRequest, steps: Sequence[Step]) -> None:
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


def _require_memory(steps: Sequence[Step]) -> None:
    free = available_memory()
    for step in steps:
        needed = step.takes.memory_bytes
        if free is not None and needed > free:
            raise InputError(
                f"Not enough memory: converting {step.component.value} needs about {needed / 2**30:.1f} GiB and "
                f"{free / 2**30:.1f} GiB are free. End other programs, add swap, or leave it out with --component."
            )
