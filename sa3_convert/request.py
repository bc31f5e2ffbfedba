"""What one conversion is asked for: a checkpoint, a recipe, where to, and which extras."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_convert.bundle.manifest import SPLIT_KINDS, ArtifactKind
from sa3_convert.components import Component, components_of
from sa3_convert.errors import UsageError
from sa3_convert.mnn.target import MnnVersion, target_for
from sa3_convert.recipe import Recipe
from sa3_convert.stages import CHANGING, Keys, stage_keys

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint


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
