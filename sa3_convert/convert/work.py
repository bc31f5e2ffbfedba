"""What the stages of a conversion do: each fills a folder and returns notes; its parameters say what it is given."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_convert.bundle.manifest import Fidelity
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import SPECS, Component, contract
from sa3_convert.convert.cache import (
    PLANNED,
    FidelityNotes,
    JudgedModelNotes,
    JudgedSlotNotes,
    MnnNotes,
    ModelNotes,
    Parts,
    RoundNotes,
    SlotNotes,
)
from sa3_convert.mnn.compatibility import MnnVersion
from sa3_convert.recipe import ComponentRecipe

if TYPE_CHECKING:
    from sa3_convert.arrays import Session
    from sa3_convert.checkpoint.reader import Checkpoint

    Opens = Callable[..., Session]


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
        storage = mnn_from_onnx(prepared, folder / f"{reference.stem}.mnn", recipe, target_mnn=target_mnn)
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
    from sa3_convert.mnn.session import MnnSession
    from sa3_convert.ort import OrtSession
    from sa3_convert.passes.pipeline import passed_through_half

    ports = contract(component, layout)
    inputs, outputs = ([port.name for port in side] for side in (ports.inputs, ports.outputs))
    opened = partial(MnnSession, target, inputs=inputs, outputs=outputs)
    with passed_through_half(reference, folder, component, recipe, target_mnn) as half:
        opens = opened, partial(OrtSession, half)
        return FidelityNotes(**_judged(reference, component, recipe.floor_db, layout, threads, *opens))


def ort_int8_stage(
    reference: Path, component: Component, layout: CheckpointLayout, folder: Path, threads: int | None
) -> JudgedModelNotes:
    """Quantise the reference for ONNX Runtime and compare the two, in parts where it runs so; see `verify_stage`."""
    from sa3_convert.passes.split import write_parts

    precision = _in_integers(reference, component, folder)
    target = folder / reference.name
    figures = _judged_integers(reference, write_parts(target, component) or [target], component, layout, threads)
    return JudgedModelNotes(precision=precision, **figures)


def ort_int8_slots_stage(
    slotted: Path, component: Component, layout: CheckpointLayout, rank: int, folder: Path, threads: int | None
) -> JudgedSlotNotes:
    """Do the same with a reference that has slots; its low-rank branches stay float."""
    from sa3_convert.passes.split import write_parts

    precision = _in_integers(slotted, component, folder)
    target = folder / slotted.name
    figures = _judged_integers(slotted, write_parts(target, component) or [target], component, layout, threads, rank)
    return JudgedSlotNotes(precision=precision, rank=rank, **figures)


def _in_integers(reference: Path, component: Component, folder: Path) -> str:
    from sa3_convert.passes.pipeline import onnx_in_integers

    return "int8" if onnx_in_integers(reference, folder / reference.name, component) else "fp32"


def _judged_integers(
    reference: Path,
    files: list[Path],
    component: Component,
    layout: CheckpointLayout,
    threads: int | None,
    rank: int | None = None,
) -> dict[str, Any]:
    from sa3_convert.ort import OrtSession
    from sa3_convert.passes.integers import FLOORS_DB
    from sa3_convert.runtime.sessions import SplitSession

    opened = partial(SplitSession.opened, OrtSession, files, optimise=True)
    return _judged(reference, component, FLOORS_DB[component], layout, threads, opened, rank=rank)


def onnx_fp16_stage(
    reference: Path, component: Component, layout: CheckpointLayout, folder: Path, threads: int | None
) -> JudgedModelNotes:
    """Rewrite the reference to compute with halves and compare the two; below the floor is an error."""
    return JudgedModelNotes(precision="fp16", **_in_halves(reference, component, layout, folder, threads))


def onnx_fp16_slots_stage(
    slotted: Path, component: Component, layout: CheckpointLayout, rank: int, folder: Path, threads: int | None
) -> JudgedSlotNotes:
    """Do the same with a reference that has slots, whose low-rank branches compute with halves too."""
    figures = _in_halves(slotted, component, layout, folder, threads, rank)
    return JudgedSlotNotes(precision="fp16", rank=rank, **figures)


def _in_halves(
    reference: Path,
    component: Component,
    layout: CheckpointLayout,
    folder: Path,
    threads: int | None,
    rank: int | None = None,
) -> dict[str, Any]:
    from sa3_convert.ort import OrtSession
    from sa3_convert.passes.half import FLOORS_DB
    from sa3_convert.passes.pipeline import onnx_in_half

    onnx_in_half(reference, folder / reference.name)
    opened = partial(OrtSession, folder / reference.name, optimise=True)
    return _judged(reference, component, FLOORS_DB[component], layout, threads, opened, rank=rank)


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
    from sa3_convert.mnn.converter import mnn_from_onnx
    from sa3_convert.mnn.session import MnnSession
    from sa3_convert.ort import OrtSession
    from sa3_convert.passes.pipeline import onnx_for_mnn, passed_through_half
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
        with passed_through_half(rest, folder, component, recipe, target_mnn) as half:
            each = (MnnSession, targets), (OrtSession, [*parts, half])
            opens = (partial(SplitSession.opened, *kind_and_files) for kind_and_files in each)
            figures = _judged(reference, component, recipe.floor_db, layout, threads, *opens)
    return JudgedModelNotes(precision=recipe.precision, **figures)


def export_slots_stage(checkpoint: "Checkpoint", component: Component, rank: int, folder: Path) -> SlotNotes:
    """Export one component's reference ONNX with slots for adapters."""
    from sa3_convert.export.component import export_component

    export_component(checkpoint, component, folder / f"{component.value}_slots.onnx", rank)
    return SlotNotes(precision="fp32", rank=rank, detail=_size(folder))


def slots_stage(
    slotted: Path,
    component: Component,
    recipe: ComponentRecipe,
    planned: Path | None,
    layout: CheckpointLayout,
    rank: int,
    folder: Path,
    threads: int | None,
    target_mnn: MnnVersion,
) -> JudgedSlotNotes:
    """Convert a component with slots, and compare it with its reference on adapters of several kinds."""
    from sa3_convert.mnn.session import MnnSession

    made = mnn_stage(slotted, component, recipe, planned, folder, target_mnn)
    opened = partial(MnnSession, folder / f"{slotted.stem}.mnn")
    figures = _judged(slotted, component, recipe.floor_db, layout, threads, opened, rank=rank)
    return JudgedSlotNotes(rank=rank, **made.model_dump(exclude={"detail", "passes"}), **figures)


def _size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:.1f} MiB"


def _judged(
    reference: Path,
    component: Component,
    floor: float,
    layout: CheckpointLayout,
    threads: int | None,
    *opens: "Opens",
    rank: int | None = None,
) -> dict[str, Any]:
    """Return the figures of what opens a target, and maybe what emulates it in halves; below the floor is an error."""
    from sa3_convert.check.compare import verify_sessions
    from sa3_convert.check.inputs import samples_for
    from sa3_convert.ort import OrtSession

    sessions: tuple[Opens, ...] = (partial(OrtSession, reference), *opens)
    first, target, *halved = (partial(opened, threads=threads) for opened in sessions)
    samples = samples_for(component, layout, quick=True, rank=rank)
    result = verify_sessions(first, target, component, layout, samples, *halved)
    result.check_floor(floor)
    worst, half_db = result.worst, result.half_db
    detail = f"{worst.signal_to_noise_db:.1f} dB" + ("" if half_db is None else f", at low {half_db:.1f}")
    return {"fidelity": Fidelity(**worst.model_dump()), "floor_db": floor, "half_db": half_db, "detail": detail}
