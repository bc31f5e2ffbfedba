"""Recipes, `configs/*.yaml` read strictly: what each component's weights are stored as, how close it must stay."""

import difflib
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import SchemaError, SchemaValidator, core_schema

from sa3_convert.components import SPECS, Component
from sa3_convert.errors import RecipeError
from sa3_convert.system.plain_yaml import parse_yaml
from sa3_convert.system.untrusted import read_text

_CLASSES = {"d": "[0-9]", "D": "[^0-9]", "w": "[0-9A-Za-z_]", "W": "[^0-9A-Za-z_]", "s": r"[ \t\n]", "S": r"[^ \t\n]"}
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_COUNTED = re.compile(r"\{[^}]*?(\d+)\}")
_LARGEST_PATTERN = 50_000


@functools.lru_cache(maxsize=1024)
def layer_pattern(pattern: str) -> SchemaValidator:
    r"""Compile a pattern; what is returned tells by `isinstance_python` whether it is found in a name.

    Names of layers are ASCII, and so are the classes `\d`, `\w` and `\s`: those of all Unicode take milliseconds each.
    """
    size = len(pattern)
    for count in _COUNTED.findall(pattern):
        size = min(size * max(int(count[:9]), 1), _LARGEST_PATTERN + 1)
    if size > _LARGEST_PATTERN:
        raise ValueError(f"{pattern[:60]!r} is too large with its repetitions. Use * or + instead of numbers.")
    try:
        return SchemaValidator(core_schema.str_schema(pattern=_ESCAPED.sub(_ascii, pattern)))
    except SchemaError as error:
        why = str(error).rstrip().splitlines()[-1].strip().removeprefix("error: ")
        raise ValueError(f"{pattern[:60]!r} is not a regular expression that is taken here: {why}") from None


def _ascii(escaped: re.Match[str]) -> str:
    if escaped[1] in "pP":
        raise ValueError(f"{escaped.string[:60]!r} names a class of Unicode; names of layers are ASCII.")
    return _CLASSES.get(escaped[1], escaped[0])


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

    @property
    def quantises(self) -> bool:
        """Whether it stores weights as integers: who asks for that takes integers for speed, too."""
        return any(component.weights is not None for component in self.components.values())

    def for_component(self, component: Component) -> ComponentRecipe:
        """Return a component's part; a recipe that does not mention it is refused."""
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


_CONFIGS: Final = "configs"
_EXTENDS: Final = "extends"
_LARGEST_FILE: Final = 64 << 10
"""Bytes of a file; a rule for each layer of the largest component takes a quarter of them."""
_LONGEST_CHAIN: Final = 8


def recipe_file(given: Path, beside: Path = Path()) -> Path:
    """Return the file that is meant: itself, or the project's own of that name wherever the command is run.

    `int8`, `int8.yaml` and `configs/int8.yaml` are the same recipe where no file of that name is in the way.
    """
    path = beside / given
    if os.path.isfile(path):  # noqa: PTH113 -- Path.is_file raises for a name that is too long
        return path
    own = own_recipes()
    name = given.name.removesuffix(".yaml")
    if given.parent in (Path(), Path(_CONFIGS)) and name in own:
        return own[name]
    if os.path.lexists(path):
        return path
    raise _absent(path)


def own_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    # In a checkout the package's folder is a link, which not every file system has.
    package, checkout = (Path(os.path.realpath(folder / _CONFIGS)) for folder in Path(__file__).parents[:2])
    return {file.stem: file for file in sorted((package if package.is_dir() else checkout).glob("*.yaml"))}


def read_recipe(path: Path, *, resolved: bool = False) -> Any:
    """Return what stands in a recipe, put over what stands in the one that it extends.

    A mapping is put over a mapping key by key; anything else, lists too, replaces what was there. Name and description
    are a recipe's own.
    """
    if not resolved:
        return _over_its_base(path, ())
    data = _parsed(path)
    if isinstance(data, dict) and _EXTENDS in data:
        raise RecipeError(f"Recipe {path} extends another. A bundle's stands for itself; convert again.")
    return data


def _over_its_base(path: Path, above: tuple[str, ...]) -> Any:
    data = _parsed(path)
    if not isinstance(data, dict) or _EXTENDS not in data:
        return data
    base = data.pop(_EXTENDS)
    if not isinstance(base, str) or not base:
        raise RecipeError(f"Recipe {path} is not valid:\n  {_EXTENDS}: is to be the name or path of another recipe")
    chain = (*above, os.path.realpath(path))
    if len(chain) > _LONGEST_CHAIN:
        raise RecipeError(f"Recipe {path} is the {len(chain)}th that extends another; at most {_LONGEST_CHAIN} may.")
    try:
        file = recipe_file(Path(base), path.parent)
    except RecipeError as error:
        raise RecipeError(f"Recipe {path} extends one that is not there. {error}") from None
    if os.path.realpath(file) in chain:
        raise RecipeError(f"Recipe {path} is not valid:\n  {_EXTENDS}: {base} extends this one in turn")
    below = _over_its_base(file, chain)
    if not isinstance(below, dict):
        raise RecipeError(f"Recipe {path} extends {file}, which holds no recipe.")
    inherited = {key: value for key, value in below.items() if key not in ("name", "description")}
    return _merged(inherited, data)


def _merged(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            value = _merged(under, value)
        merged[key] = value
    return merged


def _parsed(path: Path) -> Any:
    try:
        return parse_yaml(read_text(path, _LARGEST_FILE))
    except FileNotFoundError:
        raise _absent(path) from None
    except OSError as error:
        raise RecipeError(f"Recipe {path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise RecipeError(f"Recipe {path} cannot be read: {error}") from None


def _absent(path: Path) -> RecipeError:
    return RecipeError(f"Recipe {path} does not exist. The project's own are {', '.join(own_recipes())}.")
