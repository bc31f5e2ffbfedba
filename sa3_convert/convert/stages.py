"""The stages of a conversion, in one table: what each reads, depends on, does, leaves and takes."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sa3_convert.bundle.manifest import SPLIT_KINDS, ArtifactKind
from sa3_convert.components import ADAPTED, SPECS, Component, contract
from sa3_convert.convert.cache import (
    PLANNED,
    CachedResult,
    FidelityNotes,
    JudgedModelNotes,
    JudgedSlotNotes,
    MnnNotes,
    ModelNotes,
    Notes,
    Parts,
    RoundNotes,
    SlotNotes,
)
from sa3_convert.convert.work import (
    export_slots_stage,
    export_stage,
    mnn_stage,
    onnx_fp16_slots_stage,
    onnx_fp16_stage,
    ort_int8_slots_stage,
    ort_int8_stage,
    round_stage,
    slots_stage,
    split_stage,
    verify_stage,
)
from sa3_convert.mnn.compatibility import DEFAULT_TARGET, MnnVersion
from sa3_convert.recipe import ComponentRecipe
from sa3_convert.system.log import kept

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint
    from sa3_convert.convert.plan import ConvertRequest

StageKeys = Mapping[str, str]
"""Fingerprints of the stages that a component can go through, in order; each contains those of what it reads."""


@dataclass(slots=True)
class ComponentJob:
    """One component that is to be converted, and what its stages have left so far."""

    checkpoint: "Checkpoint"
    component: Component
    recipe: ComponentRecipe
    target_mnn: MnnVersion = DEFAULT_TARGET
    threads: int | None = None
    rank: int | None = None
    """Of the slots for adapters, if it gets a model with them."""
    parts: Parts | None = None
    results: dict[str, CachedResult[Any]] = field(default_factory=dict)

    def given(self, folder: Path) -> dict[str, Any]:
        """Return what a stage that works in `folder` can be given, by the names of its parameters."""
        files = {
            "reference": ("export", "{}.onnx"),
            "planned": ("round", PLANNED),
            "target": ("mnn", "{}.mnn"),
            "slotted": ("export-slots", "{}_slots.onnx"),
        }
        left = {
            what: self.results[stage].file(name.format(self.component.value))
            for what, (stage, name) in files.items()
            if stage in self.results
        }
        own = {
            name: getattr(self, name)
            for name in ("checkpoint", "component", "recipe", "target_mnn", "threads", "rank", "parts")
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
    converter_memory_per_gib: float = 0.0
    """GiB that MNN's converter takes beyond that for weights that it holds in one file, which are at most 2000 MB."""
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


def _gets_slots(job: ComponentJob) -> bool:
    return job.component in ADAPTED and job.rank is not None


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
            cost=StageCost(200, 1.2, start_memory=3.4),
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
            cost=StageCost(18, 0.3, converter_memory_per_gib=3.3, least_squares_per_gib=24, scratch=2),
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
            cost=StageCost(17, 1.1, start_memory=1.5, scratch=1),
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
            cost=StageCost(40, 1.1, start_seconds=4, start_memory=1.5, converter_memory_per_gib=2.5, scratch=3),
        ),
        Stage(
            name="export-slots",
            verb="exporting with slots",
            work=export_slots_stage,
            notes=SlotNotes,
            tools=("torch", "onnx", "onnx-ir", "onnxscript"),
            depends=lambda job: job.origin() | {"rank": job.rank},
            applies=_gets_slots,
            leaves={"onnx-slots": "{}_slots.onnx"},
            folder="reference",
            cost=StageCost(40, 0.4, start_seconds=20),
        ),
        Stage(
            name="slots",
            verb="converting with slots",
            work=slots_stage,
            notes=JudgedSlotNotes,
            reads=("export-slots", "round"),
            tools=("MNN", "onnx-ir", "onnxruntime"),
            depends=lambda job: job.storage() | {"floor_db": job.recipe.floor_db},
            applies=_gets_slots,
            leaves={"mnn-slots": "{}_slots.mnn"},
            cost=StageCost(65, 1.1, start_memory=1.5, converter_memory_per_gib=5.5, scratch=3),
        ),
        Stage(
            name="ort-int8-slots",
            verb="quantising with slots",
            work=ort_int8_slots_stage,
            notes=JudgedSlotNotes,
            reads=("export-slots",),
            tools=("onnx-ir", "onnxruntime"),
            applies=_gets_slots,
            asked=lambda request: request.with_ort_int8,
            leaves={"onnx-int8-slots": "{}_slots.onnx"},
            folder="onnxruntime-int8",
            cost=StageCost(40, 1.5),
        ),
        Stage(
            name="onnx-fp16-slots",
            verb="halving with slots",
            work=onnx_fp16_slots_stage,
            notes=JudgedSlotNotes,
            reads=("export-slots",),
            tools=("onnx-ir", "onnxruntime"),
            applies=_gets_slots,
            asked=lambda request: request.with_onnx == "fp16",
            leaves={"onnx-fp16-slots": "{}_slots.onnx"},
            folder="onnxruntime-fp16",
            cost=StageCost(40, 1.6),
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
