"""The stages of a conversion, in one table: what each reads, depends on, does, leaves and takes."""

import inspect
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sa3_convert.bundle.manifest import SPLIT_KINDS, ArtifactKind, Fidelity
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import SPECS, Component, contract
from sa3_convert.convert.cache import (
    PLANNED,
    CachedResult,
    FidelityNotes,
    JudgedModelNotes,
    MnnNotes,
    ModelNotes,
    Notes,
    Parts,
    RoundNotes,
)
from sa3_convert.mnn.compatibility import DEFAULT_TARGET, MnnVersion
from sa3_convert.recipe import ComponentRecipe
from sa3_convert.system.log import kept

if TYPE_CHECKING:
    from sa3_convert.arrays import Session
    from sa3_convert.checkpoint.reader import Checkpoint
    from sa3_convert.convert.plan import ConvertRequest

    Opens = Callable[..., Session]

StageKeys = Mapping[str, str]
"""Fingerprints of the stages that a component can go through, in order; each contains those of what it reads."""


def export_stage(checkpoint: "Checkpoint", component: Component, folder: Path) -> ModelNotes:
    """Export one component's reference ONNX into `folder`."""
    from sa3_convert.export.component import export_component

    checkpoint.check_values(component)
    path = folder / f"{component.value}.onnx"
    export_component(checkpoint, component, path)
    return ModelNotes(precision="fp32", detail=_size(folder))


def round_stage(
    checkpoint: "Checkpoint",
    component: Component,
    recipe: ComponentRecipe,
    folder: Path,
    threads: int | None,
    parts: Parts,
) -> RoundNotes:
    """Round the linears whose rounding makes up for what came before, keeping each layer that is done."""
    from sa3_convert.rounding.network import PlannedWeights, round_network

    linears = round_network(checkpoint, component, recipe, threads=threads, kept=parts.linears, tell=parts.tell)
    PlannedWeights.write(folder / PLANNED, linears)
    gains, helped = (
        {linear.name: round(linear.gain_db, 2) for linear in linears},
        sum(one.compensated for one in linears),
    )
    return RoundNotes(gains_db=gains, detail=f"compensated {helped} of {len(linears)} linears")


def mnn_stage(
    reference: Path,
    component: Component,
    recipe: ComponentRecipe,
    planned: Path | None,
    folder: Path,
    target_mnn: MnnVersion,
) -> MnnNotes:
    """Rewrite the reference for MNN, convert it, and audit the file that comes out."""
    from sa3_convert.mnn.converter import mnn_from_onnx
    from sa3_convert.passes.pipeline import onnx_for_mnn
    from sa3_convert.rounding.network import PlannedWeights

    weights = None if planned is None else PlannedWeights(planned)
    with tempfile.TemporaryDirectory(prefix="onnx-", dir=folder) as scratch:
        prepared = Path(scratch) / reference.name
        passes = onnx_for_mnn(reference, prepared, component, recipe, planned=weights, target_mnn=target_mnn)
        storage = mnn_from_onnx(prepared, folder / f"{component.value}.mnn", recipe, target_mnn=target_mnn)
    return MnnNotes(
        precision=recipe.precision,
        storage=storage.summary(),
        passes=passes.counts(),
        target_mnn=target_mnn,
        detail=_size(folder),
    )


def verify_stage(
    reference: Path,
    target: Path,
    component: Component,
    recipe: ComponentRecipe,
    layout: CheckpointLayout,
    folder: Path,
    threads: int | None,
    target_mnn: MnnVersion,
) -> FidelityNotes:
    """Run target and reference on the same inputs; below the floor is an error, so no result is kept."""
    from sa3_convert.check.half import written_in_half
    from sa3_convert.mnn.session import MnnSession
    from sa3_convert.ort import OrtSession

    ports = contract(component, layout)
    inputs, outputs = ([port.name for port in side] for side in (ports.inputs, ports.outputs))
    opened = partial(MnnSession, target, inputs=inputs, outputs=outputs)
    with written_in_half(reference, folder, component, recipe, target_mnn) as half:
        opens = opened, partial(OrtSession, half)
        return FidelityNotes(**_judged(reference, component, recipe.floor_db, layout, threads, *opens))


def ort_int8_stage(
    reference: Path, component: Component, layout: CheckpointLayout, folder: Path, threads: int | None
) -> JudgedModelNotes:
    """Quantise the reference for ONNX Runtime and compare the two, in parts where it runs so; see `verify_stage`."""
    from sa3_convert.ort import OrtSession
    from sa3_convert.passes.integers import FLOORS_DB
    from sa3_convert.passes.pipeline import onnx_in_integers
    from sa3_convert.passes.split import write_parts
    from sa3_convert.runtime.sessions import SplitSession

    target = folder / reference.name
    precision = "int8" if onnx_in_integers(reference, target, component) else "fp32"
    files, floor = write_parts(target, component) or [target], FLOORS_DB[component]
    opened = partial(SplitSession.opened, OrtSession, files, optimise=True)
    return JudgedModelNotes(precision=precision, **_judged(reference, component, floor, layout, threads, opened))


def onnx_fp16_stage(
    reference: Path, component: Component, layout: CheckpointLayout, folder: Path, threads: int | None
) -> JudgedModelNotes:
    """Rewrite the reference to compute with halves and compare the two; below the floor is an error."""
    from sa3_convert.ort import OrtSession
    from sa3_convert.passes.half import FLOORS_DB
    from sa3_convert.passes.pipeline import onnx_in_half

    onnx_in_half(reference, folder / reference.name)
    opened = partial(OrtSession, folder / reference.name, optimise=True)
    figures = _judged(reference, component, FLOORS_DB[component], layout, threads, opened)
    return JudgedModelNotes(precision="fp16", **figures)


def split_stage(
    reference: Path,
    component: Component,
    recipe: ComponentRecipe,
    planned: Path | None,
    layout: CheckpointLayout,
    folder: Path,
    threads: int | None,
    target_mnn: MnnVersion,
) -> JudgedModelNotes:
    """Convert a component in parts, and compare them, run as one, with the reference."""
    from sa3_convert.check.half import written_in_half
    from sa3_convert.mnn.converter import mnn_from_onnx
    from sa3_convert.mnn.session import MnnSession
    from sa3_convert.ort import OrtSession
    from sa3_convert.passes.pipeline import onnx_for_mnn
    from sa3_convert.passes.split import rules_of_part, split_onnx
    from sa3_convert.rounding.network import PlannedWeights
    from sa3_convert.runtime.sessions import SplitSession

    early = SPECS[component].early_parts
    targets = [folder / f"{component.value}_{part}.mnn" for part in (*early, "step")]
    weights = None if planned is None else PlannedWeights(planned)
    with tempfile.TemporaryDirectory(prefix="onnx-", dir=folder) as scratch:
        *parts, rest = (Path(scratch) / target.with_suffix(".onnx").name for target in targets)
        split_onnx(reference, dict(zip(parts, early.values(), strict=True)), rest)
        for part, target in zip((*parts, rest), targets, strict=True):
            own = rules_of_part(recipe, part)
            prepared = Path(scratch) / "for-mnn" / part.name
            onnx_for_mnn(part, prepared, component, own, planned=weights, target_mnn=target_mnn)
            mnn_from_onnx(prepared, target, own, target_mnn=target_mnn)
        with written_in_half(rest, folder, component, recipe, target_mnn) as half:
            each = (MnnSession, targets), (OrtSession, [*parts, half])
            opens = (partial(SplitSession.opened, *kind_and_files) for kind_and_files in each)
            figures = _judged(reference, component, recipe.floor_db, layout, threads, *opens)
    return JudgedModelNotes(precision=recipe.precision, **figures)


def _size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:.1f} MiB"


def _judged(
    reference: Path, component: Component, floor: float, layout: CheckpointLayout, threads: int | None, *opens: "Opens"
) -> dict[str, Any]:
    """Return the figures of what opens a target, and maybe what emulates it in halves; below the floor is an error."""
    from sa3_convert.check.compare import verify_sessions
    from sa3_convert.check.inputs import samples_for
    from sa3_convert.ort import OrtSession

    sessions: tuple[Opens, ...] = (partial(OrtSession, reference), *opens)
    first, target, *halved = (partial(opened, threads=threads) for opened in sessions)
    result = verify_sessions(first, target, component, layout, samples_for(component, layout, quick=True), *halved)
    result.check_floor(floor)
    worst, half_db = result.worst, result.half_db
    detail = f"{worst.signal_to_noise_db:.1f} dB" + ("" if half_db is None else f", at low {half_db:.1f}")
    return {"fidelity": Fidelity(**worst.model_dump()), "floor_db": floor, "half_db": half_db, "detail": detail}


@dataclass(slots=True)
class ComponentJob:
    """One component that is to be converted, and what its stages have left so far."""

    checkpoint: "Checkpoint"
    component: Component
    recipe: ComponentRecipe
    target_mnn: MnnVersion = DEFAULT_TARGET
    threads: int | None = None
    parts: Parts | None = None
    results: dict[str, CachedResult[Any]] = field(default_factory=dict)

    def given(self, folder: Path) -> dict[str, Any]:
        """Return what a stage that works in `folder` can be given, by the names of its parameters."""
        files = {"reference": ("export", "{}.onnx"), "planned": ("round", PLANNED), "target": ("mnn", "{}.mnn")}
        left = {
            what: self.results[stage].file(name.format(self.component.value))
            for what, (stage, name) in files.items()
            if stage in self.results
        }
        own = {
            name: getattr(self, name)
            for name in ("checkpoint", "component", "recipe", "target_mnn", "threads", "parts")
        }
        return {**own, "planned": None, "layout": self.checkpoint.layout, "folder": folder, **left}

    def origin(self) -> dict[str, Any]:
        """Return what the component is, for fingerprints."""
        return {
            "component": self.component.value,
            "weights": self.checkpoint.digest(self.component),
            "contract": repr(contract(self.component, self.checkpoint.layout)),
            "layout": repr(self.checkpoint.layout),
        }

    def storage(self) -> dict[str, Any]:
        """Return how it will be stored, for fingerprints."""
        recipe = self.recipe.model_dump(mode="json", exclude={"floor_db"})
        return {"recipe": recipe, "target_mnn": self.target_mnn}


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage takes, beyond a start, per GiB of the float32 reference."""

    seconds_per_gib: float
    memory_per_gib: float
    """GiB, not counting pages of mapped files, which the system takes back when it needs them."""
    start_seconds: float = 1.0
    start_memory: float = 1.0
    """GiB of true-size components; toys take less."""
    least_squares_per_gib: float = 0.0
    """Seconds that rounding by least squares adds."""
    scratch: int = 0
    """GiB of temporary files, all weights in each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Everything that is known of one stage."""

    name: str
    verb: str
    """What it is doing, for people."""
    work: Callable[..., Notes]
    """Does it. Its parameters say what it is given; as the key knows all the code that they lead to, they are few."""
    notes: type[Notes]
    reads: tuple[str, ...] = ()
    """Earlier stages whose results it uses, where the component goes through them."""
    tools: tuple[str, ...]
    """Distributions whose versions its key knows."""
    depends: Callable[[ComponentJob], Mapping[str, Any]] = lambda _: {}
    """What else its key knows, beside the keys of what it reads."""
    applies: Callable[[ComponentJob], bool] = lambda _: True
    """Whether a component can go through it."""
    asked: "Callable[[ConvertRequest], bool]" = lambda _: True
    """Whether a bundle gets what it leaves without having had it before."""
    leaves: Mapping[ArtifactKind, str] = field(default_factory=dict)
    """Names of the models that it leaves, {} standing for the component; what is loaded with them lies beside."""
    folder: str = ""
    """Where a bundle holds them. With a folder of their own they are ONNX, as large as the reference, and stay in the
    cache unless the bundle shall have its reference."""
    judges: ArtifactKind | None = None
    """The kind that an earlier stage left and whose fidelity it measures."""
    cost: StageCost

    def make(self, job: ComponentJob, folder: Path) -> Notes:
        """Do it, and leave its files in an empty folder; its notes also tell what was logged meanwhile."""
        given = job.given(folder)
        with kept() as lines:
            notes = self.work(**{name: given[name] for name in inspect.signature(self.work).parameters})
        return notes.model_copy(update={"log": tuple(lines)})


STAGES: Final[Mapping[str, Stage]] = {
    stage.name: stage
    for stage in (
        Stage(
            name="export",
            verb="exporting",
            work=export_stage,
            notes=ModelNotes,
            tools=("torch", "onnx", "onnx-ir", "onnxscript"),
            depends=ComponentJob.origin,
            leaves={"onnx": "{}.onnx"},
            folder="reference",
            cost=StageCost(23, 0.4, start_seconds=10),
        ),
        Stage(
            name="round",
            verb="rounding",
            work=round_stage,
            notes=RoundNotes,
            tools=("torch",),
            depends=lambda job: job.origin() | job.storage(),
            applies=lambda job: job.recipe.compensates,
            cost=StageCost(170, 1.2, start_memory=3.4),
        ),
        Stage(
            name="mnn",
            verb="converting",
            work=mnn_stage,
            notes=MnnNotes,
            reads=("export", "round"),
            tools=("MNN", "onnx-ir"),
            depends=ComponentJob.storage,
            leaves={"mnn": "{}.mnn"},
            cost=StageCost(18, 0.3, least_squares_per_gib=27, scratch=2),
        ),
        Stage(
            name="verify",
            verb="verifying",
            work=verify_stage,
            notes=FidelityNotes,
            reads=("export", "mnn"),
            tools=("MNN", "onnx-ir", "onnxruntime"),
            depends=lambda job: {"floor_db": job.recipe.floor_db},
            judges="mnn",
            cost=StageCost(10, 1.1, start_memory=1.5, scratch=1),
        ),
        Stage(
            name="ort-int8",
            verb="quantising",
            work=ort_int8_stage,
            notes=JudgedModelNotes,
            reads=("export",),
            tools=("onnx-ir", "onnxruntime"),
            asked=lambda request: request.with_ort_int8,
            leaves={"onnx-int8": "{}.onnx"},
            folder="onnxruntime-int8",
            cost=StageCost(20, 1.5),
        ),
        Stage(
            name="onnx-fp16",
            verb="halving",
            work=onnx_fp16_stage,
            notes=JudgedModelNotes,
            reads=("export",),
            tools=("onnx-ir", "onnxruntime"),
            asked=lambda request: request.with_onnx == "fp16",
            leaves={"onnx-fp16": "{}.onnx"},
            folder="onnxruntime-fp16",
            cost=StageCost(20, 1.6),
        ),
        Stage(
            name="split",
            verb="splitting",
            work=split_stage,
            notes=JudgedModelNotes,
            reads=("export", "round"),
            tools=("MNN", "onnx-ir", "onnxruntime"),
            depends=lambda job: job.storage() | {"floor_db": job.recipe.floor_db},
            applies=lambda job: bool(SPECS[job.component].early_parts),
            asked=lambda request: request.with_split_dit,
            leaves={kind: f"{{}}_{kind.removeprefix('mnn-')}.mnn" for kind in SPLIT_KINDS},
            cost=StageCost(40, 1.1, start_seconds=4, start_memory=1.5, scratch=3),
        ),
    )
}
"""In the order in which a component goes through them."""
STAGES_OF: Final[Mapping[ArtifactKind, tuple[str, ...]]] = {
    kind: (maker.name, *(judge.name for judge in STAGES.values() if judge.judges == kind))
    for maker in STAGES.values()
    for kind in maker.leaves
}
"""What makes a component's file, and what judges it, if that is another stage: its manifest has the key of the last."""
