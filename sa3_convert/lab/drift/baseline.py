"""`drift.json`: the figures that bundles had when somebody said that they were right, and who they were."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sa3_convert.components import Component
from sa3_convert.errors import InputError, UsageError
from sa3_convert.lab.generations.trajectory import GenerationCase
from sa3_convert.system.files import write_text
from sa3_convert.system.untrusted import parse_json, read_text

Rule = Literal["may not fall", "may not rise", "may not change"]
Kind = Literal["size", "storage", "fidelity", "step", "speed"]
Finite = Annotated[float, Field(allow_inf_nan=False)]

HOW_TO_START = "Make one from a bundle that you trust: --update --reason 'first baseline'."


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Data):
    """One figure, and how far it may move from here."""

    component: Component
    kind: Kind
    name: str = Field(min_length=1)
    """Unique within its bundle, together with the component."""
    value: Finite | str
    rule: Rule
    tolerance: Finite = Field(default=0.0, ge=0)
    """In the figure's own unit: dB, bytes, or a ratio of times."""
    case: str | None = None
    """To replay the worst of it."""
    step: int | None = None

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if isinstance(self.value, str) is not (self.rule == "may not change"):
            raise ValueError("numbers may move one way; text may not change")
        return self

    @property
    def key(self) -> tuple[Component, str]:
        """What it is found by."""
        return self.component, self.name


class Origin(_Data):
    """Everything that figures depend on, to say what has changed when they move."""

    converted_with: Mapping[str, str]
    """Versions of tools, from the bundle's manifest."""
    measured_with: Mapping[str, str]
    """Versions of what ran it."""
    processor: str
    recipe: Mapping[str, Any]
    """As resolved: every default filled in."""
    checkpoint: Mapping[str, str]
    """Digest of the tensors, by component."""
    code: Mapping[str, str]
    """Digest of our own source files, by room."""
    files: Mapping[str, str]
    """SHA-256 of what was compared, by path in the bundle."""


class Update(_Data):
    """Why a baseline became what it is."""

    date: str
    reason: str = Field(min_length=1)
    tools: Mapping[str, str]


class BundleBaseline(_Data):
    """What one bundle is held to."""

    variant: str
    recipe: str
    size: str
    """`toy` or `full` for the dimensions of the published family, else `custom`."""
    cases: tuple[str, ...] = Field(min_length=1)
    """What is generated to measure it."""
    steps: int = Field(ge=1)
    figures: tuple[Figure, ...] = Field(min_length=1)
    origin: Origin
    history: tuple[Update, ...] = Field(min_length=1)
    """Oldest first."""

    @model_validator(mode="after")
    def _no_figure_twice(self) -> Self:
        keys = [figure.key for figure in self.figures]
        if len(keys) != len(set(keys)):
            raise ValueError("a figure stands there twice")
        try:
            for case in self.cases:
                GenerationCase.parse(case)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is found by."""
        return self.variant, self.recipe, self.size


class Baseline(_Data):
    """The whole file: any number of bundles."""

    schema_version: Literal[1] = Field(alias="schema")
    bundles: tuple[BundleBaseline, ...] = Field(min_length=1)

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="after")
    def _no_bundle_twice(self) -> Self:
        keys = [bundle.key for bundle in self.bundles]
        if len(keys) != len(set(keys)):
            raise ValueError("a bundle stands there twice")
        return self

    def find(self, key: tuple[str, str, str]) -> BundleBaseline | None:
        """Return what a bundle is held to, if it is known."""
        return next((bundle for bundle in self.bundles if bundle.key == key), None)

    def replacing(self, bundle: BundleBaseline) -> "Baseline":
        """Return this baseline with one bundle's part replaced, or added."""
        others = [b for b in self.bundles if b.key != bundle.key]
        return Baseline(schema_version=1, bundles=tuple(sorted([*others, bundle], key=lambda b: b.key)))


def read_baseline(path: Path) -> Baseline | None:
    """Return the baseline in a file, or None if there is no such file.

    Raises:
        InputError: it cannot be read, is damaged, or is of another schema; the message names the place.

    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Baseline {path} cannot be read: {error}") from None
    try:
        parse_json(text)
        return Baseline.model_validate_json(text)
    except ValueError as error:
        problem = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            problem = f"{'.'.join(str(part) for part in first['loc']) or 'the whole'}: {first['msg']}"
        raise InputError(f"Baseline {path} is damaged: {problem}. Take it from version control again.") from None


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline whole or not at all."""
    write_text(path, baseline.model_dump_json(by_alias=True, indent=1) + "\n")


def now() -> str:
    """Return the time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
