"""What a verification found: per case and output, summed up per component and per bundle, judged by a floor.

These classes are the data of `verify --json` and of `report.json`, and what the tables and the page show.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, field
from functools import cached_property, reduce
from operator import add
from typing import Annotated, Any, Self, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, computed_field
from pydantic.dataclasses import dataclass

from sa3_convert.check.metrics import MAX_DB, Sums
from sa3_convert.components import Component
from sa3_convert.errors import VerificationError
from sa3_convert.runtime.engines import EngineName


def _bounded(value: Any) -> Any:
    """Return a ratio within ±`MAX_DB`: infinity has no place in JSON. NaN stays, and is refused."""
    return max(-MAX_DB, min(MAX_DB, value)) if isinstance(value, float) and value == value else value


Decibels = Annotated[float, BeforeValidator(_bounded), Field(ge=-MAX_DB, le=MAX_DB)]

FINITE = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True)
"""Of results that have figures which follow from others; on reading these are not believed but made again."""


_T = TypeVar("_T")


def derived(figure: Callable[[Any], _T]) -> cached_property[_T]:
    """Make a method a property that is computed once and stands in the data, and in its schema."""
    return computed_field(cached_property(figure))


class Data(BaseModel):
    """Results of which every figure is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, **FINITE)


class Figures(Data):
    """How close an output is to its reference."""

    signal_to_noise_db: Decibels
    """10·log10(Σ reference² / Σ (target − reference)²); 300 where the two are equal."""
    cosine: float
    max_abs_error: float
    mean_abs_error: float

    @classmethod
    def worst_of(cls, figures: Sequence["Figures"]) -> "Figures":
        """Return the worst of each figure."""
        return Figures(
            signal_to_noise_db=min(f.signal_to_noise_db for f in figures),
            cosine=min(f.cosine for f in figures),
            max_abs_error=max(f.max_abs_error for f in figures),
            mean_abs_error=max(f.mean_abs_error for f in figures),
        )


class Spread(Data):
    """Signal-to-noise ratios over many comparisons, in dB."""

    count: int
    mean: Decibels
    percentile_5: Decibels
    """Five in a hundred comparisons are below it."""
    worst: Decibels

    @classmethod
    def of(cls, ratios: Sequence[float], **more: Any) -> Self:
        """Return the spread of ratios; there is at least one."""
        mean, low = float(np.mean(ratios)), float(np.percentile(ratios, 5))
        return cls(count=len(ratios), mean=mean, percentile_5=low, worst=min(ratios), **more)


class Measurement(Figures):
    """One comparison on sampled inputs."""

    case: str
    """Says how to make the inputs again."""
    output: str
    """The output, or the part of it, that was compared."""
    sums: Sums | None = Field(default=None, exclude=True)
    """None for one that was read from a file."""

    def __init__(self, case: str, output: str, sums: Sums | None = None, **figures: float) -> None:
        if sums is not None:
            figures |= asdict(sums.fidelity())
        BaseModel.__init__(self, case=case, output=output, sums=sums, **figures)


ADVISED_WITHIN_DB = 3.0
"""A ratio this far below its floor may be what the weights' statistics cost; one further down is a defect."""


def advice(ratio_db: float, floor_db: float) -> str:
    """Return what to do about a ratio below a floor, as the end of a message."""
    passing = math.floor(ratio_db * 10) / 10
    if passing > 0 and ratio_db >= floor_db - ADVISED_WITHIN_DB:
        return f" It would pass with floor_db: {passing:g}."
    return " That is too far below for another floor: give its layers more bits, or look for what is broken."


@dataclass(frozen=True, config=FINITE)
class ComponentFidelity:
    """All measurements of one component; there is at least one."""

    component: Component
    measurements: Annotated[tuple[Measurement, ...], Field(serialization_alias="cases")]
    half_db: Decibels | None = field(default=None, kw_only=True)
    """The worst ratio that half inputs and half arithmetic alone leave; None is not known."""

    def __post_init__(self) -> None:
        if not self.measurements:
            raise VerificationError(f"{self.component.value}: nothing was compared.")

    @derived
    def worst_case(self) -> Measurement:
        """The measurement with the lowest signal-to-noise ratio."""
        return min(self.measurements, key=lambda m: m.signal_to_noise_db)

    @derived
    def worst(self) -> Figures:
        """The worst of each figure; they need not be of the same case."""
        return Figures.worst_of(self.measurements)

    @cached_property
    def by_case(self) -> dict[str, Figures]:
        """Each case by its worst output: a constant one would flatter it."""
        cases: dict[str, list[Figures]] = {}
        for measurement in self.measurements:
            cases.setdefault(measurement.case, []).append(measurement)
        return {case: Figures.worst_of(figures) for case, figures in cases.items()}

    @derived
    def mean(self) -> Figures:
        """The mean of each figure over the cases, each by its worst output."""
        cases = [figures.model_dump() for figures in self.by_case.values()]
        return Figures(**{name: math.fsum(figures[name] for figures in cases) / len(cases) for name in cases[0]})

    @derived
    def pooled(self) -> Figures:
        """The figures over all elements of all cases taken as one array."""
        return Figures(**asdict(reduce(add, (m.sums for m in self.measurements if m.sums)).fidelity()))

    def over(self, cases: Collection[str]) -> "ComponentFidelity":
        """Return the measurements of some cases."""
        return ComponentFidelity(self.component, tuple(m for m in self.measurements if m.case in cases))

    def shortfall(self, floor_db: float) -> str | None:
        """Return what is wrong if the worst signal-to-noise ratio is below the floor, else None."""
        worst = self.worst_case
        ratio = worst.signal_to_noise_db
        if ratio >= floor_db:
            return None
        return (
            f"{self.component.value}: {worst.output} of case {worst.case} has {ratio:z.2f} dB, the floor is "
            f"{floor_db:g} dB.{advice(ratio, floor_db)}"
        )

    def check_floor(self, floor_db: float) -> None:
        """Raise VerificationError if the worst case is below the floor."""
        if (problem := self.shortfall(floor_db)) is not None:
            raise VerificationError(problem)


CLAIM_CEILING_DB = 80.0
"""Above this the figures are rounding of float arithmetic, which differs between machines."""
CLAIM_SLACK_DB = 1.0


@dataclass(frozen=True, config=FINITE)
class Verdict(ComponentFidelity):
    """A component's figures beside what was asked of it and what its bundle claims."""

    floor_db: float
    precision: str
    claimed_db: Decibels | None = None
    """The manifest's ratio, measured on the quick cases when the model was converted."""
    measured_db: Decibels | None = None
    """The ratio on the same cases now."""
    engine: EngineName = "mnn"
    """What runs the model: a bundle can hold one for MNN, and others for ONNX Runtime."""

    @derived
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a sentence each."""
        found = [self.shortfall(self.floor_db)]
        if self.claimed_db is not None and self.measured_db is not None:
            least = min(self.claimed_db, CLAIM_CEILING_DB) - CLAIM_SLACK_DB
            if self.measured_db < least:
                found.append(
                    f"{self.component.value}: the manifest claims {self.claimed_db:z.2f} dB, the same inputs "
                    f"now give {self.measured_db:z.2f} dB. Its figures are not of this file; convert again."
                )
        return tuple(problem for problem in found if problem is not None)

    @property
    def has_floor(self) -> bool:
        """Whether anything was asked of it; of models that others published no recipe is known."""
        return self.floor_db > -MAX_DB

    @derived
    def passed(self) -> bool:
        """Whether the worst case reaches the floor and the manifest's claim is true."""
        return not self.problems


@dataclass(frozen=True, config=FINITE)
class BundleFidelity:
    """The verdicts on a bundle's models."""

    bundle: str
    recipe: str
    verdicts: Annotated[tuple[Verdict, ...], Field(serialization_alias="components")]
    contradictions: tuple[str, ...] = ()
    """What models that others published say of themselves and are not, a sentence each."""
    adapted: tuple[Verdict, ...] = field(default=(), kw_only=True)
    """Of models with slots for adapters: with none, with a low-rank step, and with factors of rows and columns too."""

    @derived
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a sentence each."""
        verdicts = (*self.verdicts, *self.adapted)
        return (*(problem for verdict in verdicts for problem in verdict.problems), *self.contradictions)

    @derived
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def check(self) -> None:
        """Raise VerificationError naming every model that falls short."""
        if self.problems:
            raise VerificationError("\n".join(self.problems))


Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, how much there is of it)"""


def sampled_stage(component: Component, engine: EngineName) -> str:
    """Return the name of running a model on sampled inputs."""
    return f"{component.value}, sampled inputs, {engine}"


def reference_stage(component: Component) -> str:
    """Return the name of computing a reference over all cases."""
    return f"{component.value}, reference"
