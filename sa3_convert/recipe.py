"""`configs/*.yaml` as frozen, strict data: what each component's weights are stored as, and how close it must stay.

A key that is not known is refused with the nearest one that is. The resolved recipe (every default filled in) is
printed before work starts and kept in the bundle.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sa3_convert.components import SPECS, Component
from sa3_convert.errors import RecipeError
from sa3_convert.layer_pattern import layer_pattern
from sa3_convert.recipe_files import read_recipe

FloatType = Literal["fp32", "fp16"]
EmbeddingType = Literal["float", "int8", "int4"]
Rounding = Literal["converter", "least_squares", "error_compensated"]
ScaleType = Literal["fp32", "fp16"]
_SHOWN = 20
"""Faults of a recipe that are told; a file that is no recipe at all has thousands."""
Bits = Annotated[int, Field(ge=2, le=8)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _checked_block_size(value: int | None) -> int | None:
    # MNN silently falls back to one scale per channel for any other value.
    if value is not None and (value < 16 or value % 16):
        raise ValueError(f"{value} is not a multiple of 16 of at least 16")
    return value


class LayerRule(_Strict):
    """An exception for the layers whose ONNX name matches; one that matches nothing fails the conversion."""

    match: str
    """Regular expression, searched in the layer's name; see `layer_pattern` for what it may hold."""
    bits: Bits | None
    """None keeps the layer in floating point."""
    block_size: int | None = None

    _block = field_validator("block_size")(_checked_block_size)

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        layer_pattern(value)
        return value

    def matches(self, name: str) -> bool:
        """Tell whether the rule is for a layer."""
        return layer_pattern(self.match).isinstance_python(name)


class WeightScheme(_Strict):
    """Integer storage of the weights of linears and convolutions."""

    bits: Bits
    symmetric: bool = False
    block_size: int | None = None
    """Input channels that share one scale; None is one scale per output channel."""
    rounding: Rounding = "converter"
    scales: ScaleType = "fp32"
    """Scales and minima. Small blocks have many: with FP16, blocks of 16 cost what blocks of 32 do with FP32."""
    layers: tuple[LayerRule, ...] = Field(default=(), max_length=256)

    _block = field_validator("block_size")(_checked_block_size)

    def for_layer(self, name: str) -> tuple[int | None, int | None]:
        """Return (bits, block size) of a layer: those of the last rule that matches, else the scheme's own."""
        chosen: tuple[int | None, int | None] = (self.bits, self.block_size)
        for rule in self.layers:
            if rule.matches(name):
                chosen = (rule.bits, rule.block_size)
        return chosen


class ComponentRecipe(_Strict):
    """How one component is stored and judged."""

    weights: WeightScheme | None = None
    """None stores the weights as `floats` says."""
    floats: FloatType = "fp32"
    """Everything that is not quantised: norms, biases, unquantised weights, and the embedding if it stays float."""
    embedding: EmbeddingType = "float"
    """The text encoder's token table; other components have none."""
    floor_db: float = Field(gt=0, allow_inf_nan=False)
    """Least signal-to-noise ratio, in dB, against ONNX Runtime on the fp32 reference."""

    @property
    def compensates(self) -> bool:
        """Whether rounding looks at what reaches the layers in use."""
        return self.weights is not None and self.weights.rounding == "error_compensated"

    @property
    def float_bytes(self) -> int:
        """Bytes of a number that stays in floating point."""
        return 2 if self.floats == "fp16" else 4

    def table_bytes(self, rows: int, width: int) -> int:
        """Return the bytes of a token table; one of integers has a scale per row."""
        bits = {"float": 8 * self.float_bytes, "int8": 8, "int4": 4}[self.embedding]
        return rows * width * bits // 8 + (self.float_bytes * rows if self.embedding != "float" else 0)

    @property
    def precision(self) -> str:
        """Short name for the manifest: the type of the bulk of the weights."""
        return self.floats if self.weights is None else f"int{self.weights.bits}"


class Recipe(_Strict):
    """A whole recipe file."""

    schema_version: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)
    description: str
    components: Mapping[Component, ComponentRecipe]

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _only_the_text_encoder_embeds(self) -> Self:
        for component, recipe in self.components.items():
            if recipe.embedding != "float" and component is not Component.TEXT_ENCODER:
                raise ValueError(f"components.{component.value}.embedding: only text_encoder has an embedding")
        return self

    @model_validator(mode="after")
    def _only_stacks_are_compensated(self) -> Self:
        for component, recipe in self.components.items():
            if recipe.compensates and SPECS[component].stack is None:
                raise ValueError(
                    f"components.{component.value}.weights.rounding: error_compensated is for text_encoder and dit; "
                    "use least_squares"
                )
        return self

    def for_component(self, component: Component) -> ComponentRecipe:
        """Return a component's part.

        Raises:
            RecipeError: the recipe does not mention it.

        """
        try:
            return self.components[component]
        except KeyError:
            raise RecipeError(f"Recipe {self.name!r} says nothing about component {component.value!r}.") from None

    def to_yaml(self) -> str:
        """Return the resolved recipe, every default filled in, as YAML that `load_recipe` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def load_recipe(path: Path, *, resolved: bool = False) -> Recipe:
    """Read and check a recipe file, with the one that it extends.

    Args:
        path: the file.
        resolved: whether it may not extend another; a bundle's is from anywhere and may name no file of this machine.

    Raises:
        RecipeError: it is missing, not YAML, or not valid; the message names the key and the nearest known one.

    """
    data = read_recipe(path, resolved=resolved)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"Recipe {path} is not valid:\n" + "\n".join(_explain(error))) from None


def _explain(error: ValidationError) -> list[str]:
    lines = []
    problems = error.errors(include_input=False, include_url=False)
    for problem in problems[:_SHOWN]:
        where = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        if problem["type"] == "extra_forbidden":
            key = str(problem["loc"][-1])
            near = difflib.get_close_matches(key, _known_keys(), n=1)
            hint = f"; perhaps you meant {near[0]!r}" if near else ""
            lines.append(f"  {where}: unknown key{hint}")
        else:
            lines.append(f"  {where or 'recipe'}: {problem['msg']}")
    if len(problems) > _SHOWN:
        lines.append(f"  and {len(problems) - _SHOWN} more")
    return lines


def _known_keys() -> list[str]:
    models: tuple[type[BaseModel], ...] = (Recipe, ComponentRecipe, WeightScheme, LayerRule)
    return sorted({"extends", *(field.alias or name for model in models for name, field in model.model_fields.items())})


def plain(recipe: ComponentRecipe) -> dict[str, Any]:
    """Return a component's recipe as JSON-ready data, for fingerprints and manifests."""
    return recipe.model_dump(mode="json")
