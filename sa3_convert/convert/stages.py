"""What one conversion is asked for, and its stages: what each depends on, and what it makes."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from sa3_convert.bundle.manifest import SPLIT_KINDS, ArtifactKind, Fidelity
from sa3_convert.checkpoint.dimensions import CheckpointLayout
from sa3_convert.components import Component, components_of, contract
from sa3_convert.convert.cache import Notes
from sa3_convert.convert.code_digest import code_digest
from sa3_convert.errors import UsageError
from sa3_convert.mnn.compatibility import DEFAULT_TARGET, MnnVersion, target_for
from sa3_convert.recipe import ComponentRecipe, Recipe, plain
from sa3_convert.system.machine import version_of
from sa3_convert.system.sealed import fingerprint

if TYPE_CHECKING:
    from sa3_convert.check.results import ComponentFidelity
    from sa3_convert.checkpoint.reader import Checkpoint

Stage = Literal["export", "round", "mnn", "verify", "ort-int8", "split"]
Keys = Mapping[Stage, str]
"""Fingerprints of the stages that a component can go through, in order; each contains those of its inputs."""

INPUTS: Final[Mapping[Stage, tuple[Stage, ...]]] = {
    "export": (),
    "round": (),
    "mnn": ("export", "round"),
    "verify": ("export", "mnn"),
    "ort-int8": ("export",),
    "split": ("export", "round"),
}
"""The stages in order, with those whose files each reads; `round` where the recipe asks for it."""
PLANNED: Final = "weights.safetensors"
"""What the round stage leaves."""
CHANGING: Final[Mapping[Component, tuple[str, ...]]] = {Component.DIT: ("x", "t")}
"""Components that run several times in one generation, and the inputs that differ between those runs."""


class RoundNotes(Notes):
    """How much each linear won."""

    gains_db: dict[str, float]


class MnnNotes(Notes):
    """What was done, and what the file holds."""

    storage: dict[str, Any]
    passes: dict[str, int]


class FidelityNotes(Notes):
    """How close a model is to its reference."""

    fidelity: Fidelity


class OrtInt8Notes(FidelityNotes):
    """Of the form for ONNX Runtime, which has floors of its own."""

    floor_db: float
    precision: Literal["int8", "fp32"]


NOTES: Final[Mapping[Stage, type[Notes]]] = {
    "export": Notes,
    "round": RoundNotes,
    "mnn": MnnNotes,
    "verify": FidelityNotes,
    "ort-int8": OrtInt8Notes,
    "split": FidelityNotes,
}


def stage_keys(
    checkpoint: "Checkpoint", component: Component, recipe: ComponentRecipe, *, target_mnn: MnnVersion = DEFAULT_TARGET
) -> Keys:
    """Return the fingerprints of a component's stages: weights, dimensions, recipe, our code, and the tools."""

    def key(stage: Callable[..., Notes], *tools: str, **parts: Any) -> str:
        return fingerprint(code=code_digest(stage), tools=[version_of(name) for name in tools], **parts)

    keys: dict[Stage, str] = {}
    keys["export"] = export = key(
        export_stage,
        *("torch", "onnx", "onnx-ir", "onnxscript"),
        component=component.value,
        weights=checkpoint.digest(component),
        contract=repr(contract(component, checkpoint.layout)),
        layout=repr(checkpoint.layout),
    )
    storage = {name: value for name, value in plain(recipe).items() if name != "floor_db"}
    if recipe.compensates:
        keys["round"] = key(round_stage, "torch", export=export, recipe=storage)
    keys["mnn"] = key(
        mnn_stage, "MNN", "onnx-ir", export=keys.get("round", export), recipe=storage, target_mnn=target_mnn
    )
    keys["verify"] = key(verify_stage, "onnxruntime", mnn=keys["mnn"], floor_db=recipe.floor_db)
    keys["ort-int8"] = key(ort_int8_stage, "onnx", "onnxruntime", export=export)
    if component in CHANGING:
        keys["split"] = key(split_stage, verify=keys["verify"])
    return keys


def export_stage(checkpoint: "Checkpoint", component: Component, folder: Path) -> Notes:
    """Export one component's reference ONNX into `folder`."""
    from sa3_convert.export.component import export_component

    checkpoint.check_values(component)
    path = folder / f"{component.value}.onnx"
    export_component(checkpoint, component, path)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return Notes(detail=f"{size / 2**20:.1f} MiB")


def round_stage(
    checkpoint: "Checkpoint", component: Component, recipe: ComponentRecipe, folder: Path, threads: int | None
) -> RoundNotes:
    """Round the linears whose rounding makes up for what came before."""
    from sa3_convert.rounding.layers import PlannedWeights
    from sa3_convert.rounding.network import round_network

    linears = round_network(checkpoint, component, recipe, threads=threads)
    PlannedWeights.write(folder / PLANNED, {linear.name: linear.weight for linear in linears})
    helped = sum(linear.compensated for linear in linears)
    return RoundNotes(
        gains_db={linear.name: round(linear.gain_db, 2) for linear in linears},
        detail=f"compensated {helped} of {len(linears)} linears",
    )


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
    from sa3_convert.rounding.layers import PlannedWeights

    target = folder / f"{component.value}.mnn"
    with tempfile.TemporaryDirectory(prefix="onnx-", dir=folder) as scratch:
        prepared = Path(scratch) / reference.name
        weights = None if planned is None else PlannedWeights(planned)
        passes = onnx_for_mnn(reference, prepared, component, recipe, planned=weights, target_mnn=target_mnn)
        storage = mnn_from_onnx(prepared, target, recipe, target_mnn=target_mnn)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return MnnNotes(storage=storage.summary(), passes=passes.counts(), detail=f"{size / 2**20:.1f} MiB")


def split_stage(
    reference: Path,
    component: Component,
    recipe: ComponentRecipe,
    planned: Path | None,
    layout: CheckpointLayout,
    folder: Path,
    threads: int | None,
    target_mnn: MnnVersion,
) -> FidelityNotes:
    """Convert a component in two parts, and compare them, run as one, with the reference."""
    from sa3_convert.check.compare import verify_split
    from sa3_convert.mnn.converter import mnn_from_onnx
    from sa3_convert.passes.pipeline import onnx_for_mnn
    from sa3_convert.passes.split import rules_of_part, split_onnx
    from sa3_convert.rounding.layers import PlannedWeights

    targets = [folder / name for name in split_names(component)]
    weights = None if planned is None else PlannedWeights(planned)
    with tempfile.TemporaryDirectory(prefix="onnx-", dir=folder) as scratch:
        parts = [Path(scratch) / target.with_suffix(".onnx").name for target in targets]
        split_onnx(reference, parts[0], parts[1], CHANGING[component])
        for part, target in zip(parts, targets, strict=True):
            own = rules_of_part(recipe, part)
            prepared = Path(scratch) / "for-mnn" / part.name
            onnx_for_mnn(part, prepared, component, own, planned=weights, target_mnn=target_mnn)
            mnn_from_onnx(prepared, target, own, target_mnn=target_mnn)
    result = verify_split(reference, targets[0], targets[1], component, layout, quick=True, threads=threads)
    result.check_floor(recipe.floor_db)
    return FidelityNotes(**_figures(result))


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
) -> FidelityNotes:
    """Run target and reference on the same inputs; below the floor is an error, so no result is kept."""
    from sa3_convert.check.compare import verify_files

    result = verify_files(reference, target, component, layout, quick=True, threads=threads)
    result.check_floor(recipe.floor_db)
    return FidelityNotes(**_figures(result))


def ort_int8_stage(
    reference: Path, component: Component, layout: CheckpointLayout, folder: Path, threads: int | None
) -> OrtInt8Notes:
    """Quantise the reference for ONNX Runtime and compare the two; below the floor is an error."""
    from sa3_convert.check.compare import verify_onnx
    from sa3_convert.rounding.ort_int8 import FLOORS_DB, quantise_for_ort

    target = folder / reference.name
    quantised = quantise_for_ort(reference, target)
    result = verify_onnx(reference, target, component, layout, quick=True, threads=threads)
    floor = FLOORS_DB[component]
    result.check_floor(floor)
    return OrtInt8Notes(**_figures(result), floor_db=floor, precision="int8" if quantised else "fp32")


def _figures(result: "ComponentFidelity") -> dict[str, Any]:
    worst = result.worst
    return {
        "fidelity": Fidelity(
            signal_to_noise_db=worst.signal_to_noise_db, cosine=worst.cosine, max_abs_error=worst.max_abs_error
        ),
        "detail": f"{worst.signal_to_noise_db:.1f} dB",
    }


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
    target_mnn: MnnVersion | None = None
    """The oldest MNN that the result has to be right on; None is, by component, the oldest that can read it."""
    with_split_dit: bool = False
    """Also make the DiT in two parts, of which one runs once per generation."""
    threads: int | None = None

    def keys(self, component: Component) -> Keys:
        """Return the fingerprints of a component's stages."""
        recipe = self.recipe.for_component(component)
        return stage_keys(self.checkpoint, component, recipe, target_mnn=self.target_of(component))

    def kinds(self, component: Component) -> tuple[ArtifactKind, ...]:
        """Return the files that are asked for of a component."""
        int8: tuple[ArtifactKind, ...] = ("onnx-int8",) if self.with_ort_int8 else ()
        split = SPLIT_KINDS if self.with_split_dit and component in CHANGING else ()
        return ("mnn", "onnx", *int8, *split)

    def target_of(self, component: Component) -> MnnVersion:
        """Return the oldest MNN that a component is made to be right on.

        Raises:
            UsageError: what is asked for cannot read what the recipe stores.

        """
        return target_for(self.recipe.for_component(component), self.target_mnn)

    def selected(self) -> tuple[Component, ...]:
        """Return the components to convert, in pipeline order.

        Raises:
            UsageError: the checkpoint has no such component.

        """
        available = components_of(self.checkpoint.layout)
        for component in self.components:
            if component not in available:
                have = ", ".join(c.value for c in available)
                raise UsageError(f"This checkpoint has no component {component.value!r}; it has {have}.")
        return tuple(c for c in available if not self.components or c in self.components)
