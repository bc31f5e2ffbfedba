"""What a conversion is asked for, and what it will do, decided before anything is made: stages, time, memory, room."""

import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from sa3_convert.bundle.manifest import Artifact, ArtifactKind
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import ADAPTED, TOKEN_TABLE, Component, components_of
from sa3_convert.convert.cache import CachedResult, StageCache
from sa3_convert.convert.code_digest import code_digest
from sa3_convert.convert.existing import (
    existing_bundle,
    is_current,
    is_right,
    is_right_shared,
    of_other_weights,
    shared_kinds,
)
from sa3_convert.convert.stages import STAGES, STAGES_OF, ComponentJob, Stage, StageKeys
from sa3_convert.errors import InputError, UsageError
from sa3_convert.mnn.compatibility import MnnVersion, target_for
from sa3_convert.recipe import ComponentRecipe, Recipe
from sa3_convert.scheduling import Estimate
from sa3_convert.system.machine import available_memory, version_of
from sa3_convert.system.sealed import fingerprint

if TYPE_CHECKING:
    from sa3_convert.checkpoint.dimensions import CheckpointLayout
    from sa3_convert.checkpoint.reader import Checkpoint

_GIB: Final = 2**30
_LEAST_MEMORY: Final = 0.6
"""GiB of a process with torch and ONNX Runtime in it and a toy to convert."""
_IN_ONE_FILE: Final = 2000e6 / 2**30
"""GiB of float weights that MNN's converter keeps in the model; more of them stand in a file beside it."""


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """What to convert, how, and to where."""

    checkpoint: "Checkpoint"
    recipe: Recipe
    out: Path
    cache: Path
    components: tuple[Component, ...] = ()
    """Empty means all that the checkpoint has."""
    force: bool = False
    """Redo everything, and replace a bundle that was made from something else."""
    with_reference: bool = False
    """Copy the reference ONNX files into the bundle instead of leaving them in the cache."""
    with_ort_int8: bool = False
    """Also make what the engine `onnxruntime-int8` runs; it is kept where the reference is."""
    with_onnx: Literal["fp16"] | None = None
    """Also make ONNX models of this precision, for the engine `onnxruntime-fp16`; kept where the reference is."""
    target_mnn: MnnVersion | None = None
    """The oldest MNN that the result has to be right on; None is, by component, the oldest that can read it."""
    with_split_dit: bool = False
    """Also make the DiT in parts, of which one runs once per generation."""
    adapter_slots: int | None = None
    """Also make models that take adapters of up to this rank as inputs."""
    threads: int | None = None

    def job(self, component: Component) -> ComponentJob:
        """Return what is to be done with a component; refused is a target that cannot read what its recipe stores."""
        recipe = self.recipe.for_component(component)
        target = target_for(recipe, self.target_mnn)
        rank = self.adapter_slots if component in ADAPTED else None
        return ComponentJob(self.checkpoint, component, recipe, target, self.threads, rank)

    def kinds(self, component: Component) -> tuple[ArtifactKind, ...]:
        """Return the files that are asked for of a component."""
        job = self.job(component)
        return tuple(
            kind for stage in STAGES.values() if stage.applies(job) and stage.asked(self) for kind in stage.leaves
        )

    def in_cache(self, stage: Stage) -> bool:
        """Tell whether what a stage leaves stays in the cache, where the bundle's manifest says to find it."""
        return bool(stage.folder) and not self.with_reference

    def selected(self) -> tuple[Component, ...]:
        """Return the components to convert, in pipeline order; one that the checkpoint lacks is refused."""
        return chosen_components(self.checkpoint.layout, self.components)


def chosen_components(layout: "CheckpointLayout", asked: Sequence[Component]) -> tuple[Component, ...]:
    """Return the components that are asked for, all if none is named, in pipeline order; refused is one that lacks."""
    available = components_of(layout)
    for component in asked:
        if component not in available:
            have = ", ".join(c.value for c in available)
            raise UsageError(f"This checkpoint has no component {component.value!r}; it has {have}.")
    return tuple(c for c in available if not asked or c in asked)


def estimate(stages: Iterable[str], reference_bytes: int, recipe: ComponentRecipe) -> Estimate:
    """Return what some stages of a component with a float32 reference of this size will take."""
    size = reference_bytes / _GIB
    costs = [STAGES[stage].cost for stage in stages]
    seconds = sum(cost.start_seconds + cost.seconds_per_gib * size for cost in costs)
    if recipe.weights is not None and recipe.weights.rounding == "least_squares":
        seconds += sum(cost.least_squares_per_gib * size for cost in costs)
    held = min(size, _IN_ONE_FILE)
    memory = (
        min(c.start_memory, _LEAST_MEMORY + 4 * size) + c.memory_per_gib * size + c.converter_memory_per_gib * held
        for c in costs
    )
    return Estimate(seconds, round(max(memory, default=0.0) * _GIB))


def total(estimates: Iterable[Estimate]) -> Estimate:
    """Return what components take one after the other."""
    found = list(estimates)
    return Estimate(sum(one.seconds for one in found), max((one.memory_bytes for one in found), default=0))


@dataclass(frozen=True, slots=True)
class ComponentPlan:
    """One component's part of the plan."""

    job: ComponentJob
    keys: StageKeys
    todo: tuple[str, ...]
    """Stages that have to run."""
    place: tuple[ArtifactKind, ...]
    """Files that the bundle gets, or that its manifest says where to find, from the results of stages."""
    found: Mapping[str, CachedResult[Any]]
    """Results of the cache that this needs."""
    reference_bytes: int
    model_bytes: int
    """Estimated from the tensors' shapes."""
    bytes_needed: int
    """Of what lasts, in cache and bundle."""
    scratch_bytes: int
    """Of what passes."""
    takes: Estimate

    @property
    def component(self) -> Component:
        """Which one."""
        return self.job.component


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Everything that a conversion will do."""

    existing: Bundle | None
    """The bundle that is completed, if one stands there."""
    steps: tuple[ComponentPlan, ...]
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


def stage_keys(job: ComponentJob) -> StageKeys:
    """Return the fingerprints of a component's stages: what they read and depend on, our code, and the tools."""
    keys: dict[str, str] = {}
    for stage in STAGES.values():
        if stage.applies(job):
            keys[stage.name] = fingerprint(
                stage=stage.name,
                code=code_digest(stage.work),
                tools=[version_of(name) for name in stage.tools],
                reads=[keys[name] for name in stage.reads if name in keys],
                depends=stage.depends(job),
            )
    return keys


def plan(request: ConvertRequest) -> ConversionPlan:
    """Return what has to be done. What stays of the components, or is used, was read and has its hash; nothing changes.

    Extras that the bundle has stay without being asked for, as long as they are what would be made now.

    Raises:
        UsageError: something else stands at `out`, or components of other weights would stay in it.
        InputError: disk or memory do not have room for it.

    """
    existing = existing_bundle(request)
    jobs = [request.job(component) for component in request.selected()]
    listed = existing.manifest.artifacts if existing else ()
    for job in jobs:
        # Slots that the bundle has are looked at although nobody asks for them.
        job.rank = job.rank or next((a.rank for a in listed if a.component is job.component and a.rank), None)
    keys = {job.component: stage_keys(job) for job in jobs}
    kept = _kept(request, existing, keys)
    steps = tuple(_component_plan(request, job, keys[job.component], kept) for job in jobs)
    _require_room(request, steps)
    _require_memory(steps)
    stays = {(artifact.component, artifact.kind) for artifact in kept}
    shared = tuple(kind for kind in shared_kinds(request) if (None, kind) not in stays)
    placed = {(step.component, kind) for step in steps for kind in step.place} | {(None, kind) for kind in shared}
    dropped = tuple(artifact for artifact in listed if (artifact.component, artifact.kind) not in stays | placed)
    done = existing is not None and not placed and not dropped and is_current(existing, request)
    return ConversionPlan(existing, steps, kept, dropped, shared, up_to_date=done)


def _kept(
    request: ConvertRequest, existing: Bundle | None, keys: Mapping[Component, StageKeys]
) -> tuple[Artifact, ...]:
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


def _component_plan(
    request: ConvertRequest, job: ComponentJob, keys: StageKeys, kept: Collection[Artifact]
) -> ComponentPlan:
    have = {artifact.kind for artifact in kept if artifact.component is job.component}
    place = tuple(kind for kind in request.kinds(job.component) if kind not in have)
    todo, found = _stages(request, keys, place)
    shapes = {name: entry.shape for name, entry in job.checkpoint.stored(job.component).items()}
    reference_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
    model_bytes = estimate_model_bytes(shapes, job.recipe)
    # The integer form has a quarter of the reference's weights, but all of its token table; halves are half of all.
    sizes = {stage.name: reference_bytes if stage.folder else model_bytes for stage in STAGES.values()}
    sizes |= {name: sizes[name] // 2 for name in ("onnx-fp16", "onnx-fp16-slots")}
    made = sum(sizes[name] for name in todo if STAGES[name].leaves)
    # Two parts have the weights of one model between them.
    makers = {kind: STAGES[STAGES_OF[kind][0]] for kind in place}
    placed = sum(sizes[s.name] // len(s.leaves) for s in makers.values() if not request.in_cache(s))
    return ComponentPlan(
        job=job,
        keys=keys,
        todo=todo,
        place=place,
        found=found,
        reference_bytes=reference_bytes,
        model_bytes=model_bytes,
        bytes_needed=made + placed,
        scratch_bytes=max((STAGES[name].cost.scratch for name in todo), default=0) * reference_bytes,
        takes=estimate(todo, reference_bytes, job.recipe),
    )


def _stages(
    request: ConvertRequest, keys: StageKeys, place: Collection[ArtifactKind]
) -> tuple[tuple[str, ...], dict[str, CachedResult[Any]]]:
    """Return the stages that have to run for some files, and the results of the cache that they and the files need."""
    cache = StageCache(request.cache)
    needed = {stage for kind in place for stage in STAGES_OF[kind]}
    todo: list[str] = []
    found: dict[str, CachedResult[Any]] = {}
    for name in reversed(tuple(keys)):
        if name not in needed:
            continue
        stage = STAGES[name]
        result = None if request.force else cache.find(name, keys[name], stage.notes)
        if result is None:
            todo.insert(0, name)
            needed.update(stage.reads)
        else:
            found[name] = result
    return tuple(todo), found


def bytes_needed(steps: Sequence[ComponentPlan]) -> int:
    """Return the temporary and lasting room that a plan takes at its peak: components are converted one by one."""
    return sum(step.bytes_needed for step in steps) + max((step.scratch_bytes for step in steps), default=0)


def _require_room(request: ConvertRequest, steps: Sequence[ComponentPlan]) -> None:
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


def _require_memory(steps: Sequence[ComponentPlan]) -> None:
    free = available_memory()
    for step in steps:
        needed = step.takes.memory_bytes
        if free is not None and needed > free:
            raise InputError(
                f"Not enough memory: converting {step.component.value} needs about {needed / 2**30:.1f} GiB and "
                f"{free / 2**30:.1f} GiB are free. End other programs, add swap, or leave it out with --component."
            )
