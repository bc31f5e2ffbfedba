"""The stages of one component's conversion: what each depends on, and what it makes."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from sa3_convert.checkpoint.layout import CheckpointLayout
from sa3_convert.components import Component, contract
from sa3_convert.fingerprint import fingerprint, source_digest, version_of
from sa3_convert.mnn.target import DEFAULT_TARGET, MnnVersion
from sa3_convert.recipe import ComponentRecipe, plain

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint
    from sa3_convert.verify.result import ComponentFidelity

Stage = Literal["export", "round", "mnn", "verify", "ort-int8", "split"]

PLANNED: Final = "weights.safetensors"
"""What the round stage leaves."""
CHANGING: Final[Mapping[Component, tuple[str, ...]]] = {Component.DIT: ("x", "t")}
"""Components that run several times in one generation, and the inputs that differ between those runs."""
_ROUNDING: Final = tuple(f"quantise/{name}" for name in ("grid", "layers", "planned"))
"""Modules that decide where weights are rounded to while the graph is rewritten."""
_PLANNING: Final = (
    *(f"quantise/{name}" for name in ("calibrate", "compensated", "grid", "network", "planned", "sequential")),
    "networks",
    "passes/quantise_embedding",
    "verify/inputs",
)
"""Modules that decide where they are rounded to ahead of that."""
_VERIFYING: Final = (
    *(f"verify/{name}" for name in ("cases", "compare", "component", "inputs", "metrics", "result")),
    "ort",
    "session",
)
"""Modules that a conversion's own verification is made of."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Fingerprints of a component's stages; each contains the one before."""

    export: str
    round: str | None
    """None when the recipe leaves all rounding to the mnn stage."""
    mnn: str
    verify: str
    ort_int8: str | None = None
    """None when it is not asked for."""
    split: str | None = None
    """None when it is not asked for, or there is nothing to split."""

    def in_order(self) -> tuple[tuple[Stage, str], ...]:
        """Return the stages that the component goes through, each with its fingerprint."""
        rounding: tuple[tuple[Stage, str], ...] = () if self.round is None else (("round", self.round),)
        int8: tuple[tuple[Stage, str], ...] = () if self.ort_int8 is None else (("ort-int8", self.ort_int8),)
        split: tuple[tuple[Stage, str], ...] = () if self.split is None else (("split", self.split),)
        return (("export", self.export), *rounding, ("mnn", self.mnn), ("verify", self.verify), *int8, *split)


def stage_keys(
    checkpoint: "Checkpoint",
    component: Component,
    recipe: ComponentRecipe,
    *,
    target_mnn: MnnVersion = DEFAULT_TARGET,
    ort_int8: bool = False,
    split: bool = False,
) -> Keys:
    """Return the fingerprints of a component's stages: weights, dimensions, recipe, our code, and the tools."""
    merge = {"merge": source_digest("checkpoint/lora")} if checkpoint.loras_of(component) else {}
    export = fingerprint(
        **merge,
        component=component.value,
        weights=checkpoint.digest(component),
        contract=repr(contract(component, checkpoint.layout)),
        layout=repr(checkpoint.layout),
        code=source_digest("networks", "export", "components"),
        tools=[version_of(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")],
    )
    storage = {name: value for name, value in plain(recipe).items() if name != "floor_db"}
    rounding = None
    if recipe.compensates:
        rounding = fingerprint(
            export=export, recipe=storage, code=source_digest(*_PLANNING), tools=[version_of("torch")]
        )
    mnn = fingerprint(
        export=rounding or export,
        recipe=storage,
        target_mnn=target_mnn,
        code=source_digest("passes", "mnn", *_ROUNDING),
        tools=[version_of(name) for name in ("MNN", "onnx-ir")],
    )
    verify = fingerprint(
        mnn=mnn,
        floor_db=recipe.floor_db,
        code=source_digest(*_VERIFYING),
        tools=[version_of("onnxruntime")],
    )
    int8 = fingerprint(
        export=export,
        code=source_digest("quantise/ort_int8", *_VERIFYING),
        tools=[version_of(name) for name in ("onnx", "onnxruntime")],
    )
    parts = fingerprint(verify=verify, code=source_digest("runtime/split_session"))
    return Keys(
        export, rounding, mnn, verify, int8 if ort_int8 else None, parts if split and component in CHANGING else None
    )


def export_stage(checkpoint: "Checkpoint", component: Component, folder: Path) -> dict[str, Any]:
    """Export one component's reference ONNX into `folder`."""
    from sa3_convert.export.component import export_component

    checkpoint.check_values(component)
    path = folder / f"{component.value}.onnx"
    export_component(checkpoint, component, path)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"bytes": size, "detail": f"{size / 2**20:.1f} MiB"}


def round_stage(
    checkpoint: "Checkpoint", component: Component, recipe: ComponentRecipe, folder: Path, threads: int | None
) -> dict[str, Any]:
    """Round the linears whose rounding makes up for what came before."""
    from sa3_convert.quantise.network import round_network
    from sa3_convert.quantise.planned import PlannedWeights

    linears = round_network(checkpoint, component, recipe, threads=threads)
    PlannedWeights.write(folder / PLANNED, {linear.name: linear.weight for linear in linears})
    helped = sum(linear.compensated for linear in linears)
    return {
        "gains_db": {linear.name: round(linear.gain_db, 2) for linear in linears},
        "detail": f"compensated {helped} of {len(linears)} linears",
    }


def mnn_stage(
    reference: Path,
    component: Component,
    recipe: ComponentRecipe,
    planned: Path | None,
    folder: Path,
    target_mnn: MnnVersion,
) -> dict[str, Any]:
    """Rewrite the reference for MNN, convert it, and audit the file that comes out."""
    from sa3_convert.mnn.convert import mnn_from_onnx
    from sa3_convert.passes.pipeline import onnx_for_mnn
    from sa3_convert.quantise.planned import PlannedWeights

    target = folder / f"{component.value}.mnn"
    with tempfile.TemporaryDirectory(prefix="onnx-", dir=folder) as scratch:
        prepared = Path(scratch) / reference.name
        weights = None if planned is None else PlannedWeights(planned)
        passes = onnx_for_mnn(reference, prepared, component, recipe, planned=weights, target_mnn=target_mnn)
        storage = mnn_from_onnx(prepared, target, recipe, target_mnn=target_mnn)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return {"storage": storage.summary(), "passes": passes.counts(), "detail": f"{size / 2**20:.1f} MiB"}


def split_stage(
    reference: Path,
    component: Component,
    recipe: ComponentRecipe,
    planned: Path | None,
    layout: CheckpointLayout,
    folder: Path,
    threads: int | None,
    target_mnn: MnnVersion,
) -> dict[str, Any]:
    """Convert a component in two parts, and compare them, run as one, with the reference."""
    from sa3_convert.mnn.convert import mnn_from_onnx
    from sa3_convert.passes.pipeline import onnx_for_mnn
    from sa3_convert.passes.split import rules_of_part, split_onnx
    from sa3_convert.quantise.planned import PlannedWeights
    from sa3_convert.verify.component import verify_split

    targets = [folder / name for name in split_names(component)]
    weights = None if planned is None else PlannedWeights(planned)
    with tempfile.TemporaryDirectory(prefix="onnx-", dir=folder) as scratch:
        parts = [Path(scratch) / target.with_suffix(".onnx").name for target in targets]
        handed_over = split_onnx(reference, parts[0], parts[1], CHANGING[component])
        for part, target in zip(parts, targets, strict=True):
            own = rules_of_part(recipe, part)
            prepared = Path(scratch) / "for-mnn" / part.name
            onnx_for_mnn(part, prepared, component, own, planned=weights, target_mnn=target_mnn)
            mnn_from_onnx(prepared, target, own, target_mnn=target_mnn)
    result = verify_split(reference, targets[0], targets[1], component, layout, quick=True, threads=threads)
    result.check_floor(recipe.floor_db)
    return _notes(result) | {"handed_over": len(handed_over)}


def split_names(component: Component) -> tuple[str, str]:
    """Return the file names of the two parts of a component."""
    return f"{component.value}_prepare.mnn", f"{component.value}_step.mnn"


def verify_stage(
    reference: Path,
    target: Path,
    component: Component,
    recipe: ComponentRecipe,
    layout: CheckpointLayout,
    threads: int | None,
) -> dict[str, Any]:
    """Run target and reference on the same inputs; below the floor is an error, so no result is kept."""
    from sa3_convert.verify.component import verify_files

    result = verify_files(reference, target, component, layout, quick=True, threads=threads)
    result.check_floor(recipe.floor_db)
    return _notes(result)


def ort_int8_stage(
    reference: Path, component: Component, layout: CheckpointLayout, folder: Path, threads: int | None
) -> dict[str, Any]:
    """Quantise the reference for ONNX Runtime and compare the two; below the floor is an error."""
    from sa3_convert.quantise.ort_int8 import FLOORS_DB, quantise_for_ort
    from sa3_convert.verify.component import verify_onnx

    target = folder / reference.name
    quantised = quantise_for_ort(reference, target)
    result = verify_onnx(reference, target, component, layout, quick=True, threads=threads)
    floor = FLOORS_DB[component]
    result.check_floor(floor)
    return _notes(result) | {"floor_db": floor, "precision": "int8" if quantised else "fp32"}


def _notes(result: "ComponentFidelity") -> dict[str, Any]:
    worst = result.worst
    return {
        "fidelity": {
            "signal_to_noise_db": worst.signal_to_noise_db,
            "cosine": worst.cosine,
            "max_abs_error": worst.max_abs_error,
        },
        "cases": result.to_data(),
        "detail": f"{worst.signal_to_noise_db:.1f} dB",
    }
