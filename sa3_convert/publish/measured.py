"""What a card is told beside manifests: by `verify`, `bench` and `selftest`, held to the models they speak of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sa3_convert.bundle.manifest import Label, Manifest, Name, Sha256, Text
from sa3_convert.bundle.table import Bench, BenchRow, Count, Machine
from sa3_convert.check.results import Decibels
from sa3_convert.checkpoint.published import published_layout
from sa3_convert.checkpoint.variants import VARIANTS, Size
from sa3_convert.components import Component
from sa3_convert.errors import InputError, UsageError
from sa3_convert.system.checked_files import sha256_of_all
from sa3_convert.system.untrusted import parse_json, read_text

_LARGEST: Final = 256 << 20
_MOST: Final = 1000
_Cosine = Annotated[float, Field(ge=-2, le=2)]
_Distance = Annotated[float, Field(ge=0, le=1e6)]
_Prompt = Annotated[str, Field(max_length=1 << 16)]


class _Data(BaseModel):
    # A report says far more than a card shows.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Spread(_Data):
    """Signal-to-noise ratios over many comparisons, in dB."""

    count: Count
    mean: Decibels
    percentile_5: Decibels
    worst: Decibels


class _Step(Spread):
    step: Count
    best: Decibels


class _Figures(_Data):
    cosine: _Cosine


class _File(_Data):
    sha256: Sha256


class ReportedModel(_Data):
    """One model on sampled inputs."""

    component: Component
    engine: Name
    passed: bool
    spread: Spread
    worst: _Figures
    files: tuple[_File, ...] = Field(max_length=2)


class Distribution(_Data):
    """One quantity over whole generations."""

    name: Text
    spread: Spread
    by_step: tuple[_Step, ...] = Field(max_length=_MOST)


class _Generations(_Data):
    engine: Name
    steps: Count
    distributions: tuple[Distribution, ...] = Field(max_length=_MOST)


class _Audio(_Data):
    mean_spectral_distance_db: _Distance
    envelope_correlation: _Cosine
    loudness_db: Decibels


class Divergence(_Data):
    """How far one generation went from the reference's."""

    latent_cosine: _Cosine
    audio: _Audio


class _Heard(_Data):
    prompt: _Prompt
    target: Divergence
    chaos: Divergence


class EndToEnd(_Data):
    """From prompt to audio, beside what a nudge of the noise does."""

    cases: tuple[_Heard, ...] = Field(min_length=1, max_length=_MOST)
    nudge: _Distance
    chaos_ratio: _Distance


class _Made(_Data):
    variant: Label
    recipe: Name
    verified_with: dict[Name, Text]


class Report(_Data):
    """What a card shows of a `report.json`."""

    kind: Literal["sa3-convert verification"]
    passed: bool
    made: _Made
    components: tuple[ReportedModel, ...] = Field(max_length=_MOST)
    generations: _Generations | None
    end_to_end: EndToEnd | None

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read a `report.json`; InputError if it is something else."""
        try:
            text = read_text(path, _LARGEST)
            parse_json(text)
            return cls.model_validate_json(text)
        except (OSError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else error
            raise InputError(f"{path} is no report of `sa3-convert verify --report`: {why}") from None

    @property
    def models(self) -> tuple[ReportedModel, ...]:
        """Of MNN."""
        return tuple(model for model in self.components if model.engine == "mnn")

    @property
    def of_generations(self) -> tuple[Distribution, ...]:
        """What MNN's models made of whole generations; nothing if another engine ran them."""
        found = self.generations
        return found.distributions if found is not None and found.engine == "mnn" else ()

    @property
    def heard(self) -> EndToEnd | None:
        """What MNN's models made from prompt to audio."""
        return self.end_to_end if self.of_generations else None


class _Judged(_Data):
    engine: Name
    what: Name
    db: Decibels | None
    again_db: Decibels | None
    passes: bool


class _Golden(_Data):
    engine: Name
    what: Text
    of_peak: _Distance | None
    limit: _Distance
    passes: bool


class _Gpu(_Data):
    name: Text
    driver: Text
    memory_bytes: Count


class _Surroundings(Machine):
    gpus: tuple[_Gpu, ...] = Field(max_length=64)
    cuda_driver: Text


class SelfTest(_Data):
    """What a card shows of what `selftest --json` wrote."""

    kind: Literal["sa3-convert selftest"]
    passed: bool
    device: Literal["cpu", "cuda"]
    variant: Name
    size: Size
    surroundings: _Surroundings
    absent: dict[Name, Text]
    golden: tuple[_Golden, ...] = Field(max_length=_MOST)
    findings: tuple[_Judged, ...] = Field(max_length=_MOST)
    rows: tuple[BenchRow, ...] = Field(max_length=_MOST)

    @classmethod
    def read(cls, path: Path, manifests: Mapping[str, Manifest]) -> Self:
        """Read a file; InputError if it is something else, or of models of other dimensions than all bundles have."""
        try:
            text = read_text(path)
            parse_json(text)
            found = cls.model_validate_json(text, strict=True)
        except (OSError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else error
            raise InputError(f"{path} is no result of `sa3-convert selftest --json`: {why}") from None
        variant = VARIANTS.get(found.variant)
        layout = None if variant is None else replace(published_layout(variant, found.size), source_id=None)
        if all(replace(manifest.layout, source_id=None) != layout for manifest in manifests.values()):
            raise InputError(
                f"{path} is of a {found.variant} of {found.size} size, whose dimensions none of the bundles has, so it "
                "tells nothing of them. `selftest` makes toys, with --full models of small's true size."
            )
        return found

    @property
    def all_pass(self) -> bool:
        """Whether it says that it passed, and nothing in it contradicts that."""
        judged: tuple[_Golden | _Judged, ...] = (*self.golden, *self.findings)
        return self.passed and all(one.passes for one in judged)


_Found = TypeVar("_Found", Report, Bench)


@dataclass(frozen=True)
class Read(Generic[_Found]):
    """What stands in a file, and whose models it speaks of."""

    name: str
    """Of the file, in messages."""
    found: _Found
    of: tuple[str, str]
    """Label and recipe of the bundle that it says it is of."""
    hashes: Mapping[Component, str]
    """SHA-256 of each model that it speaks of, its weights in a file of their own included."""


ReadReport = Read[Report]
ReadBench = Read[Bench]


def read_reports(paths: Sequence[Path]) -> list[ReadReport]:
    """Read files that `verify --report` wrote, or the folders that they are in."""
    files = [path / "report.json" if path.is_dir() else path for path in paths]
    return [_of_report(str(path), Report.read(path)) for path in files]


def _of_report(name: str, report: Report) -> ReadReport:
    hashes = {
        model.component: sha256_of_all([file.sha256 for file in model.files]) if model.files else ""
        for model in report.models
    }
    return Read(name, report, (report.made.variant, report.made.recipe), hashes)


def read_benches(paths: Sequence[Path]) -> list[ReadBench]:
    """Read files that `bench --json` wrote."""
    found = [(str(path), Bench.read(path)) for path in paths]
    return [Read(name, bench, (bench.variant, bench.recipe), bench.models) for name, bench in found]


def by_bundle(manifests: Mapping[str, Manifest], found: Sequence[Read[_Found]]) -> dict[str, list[Read[_Found]]]:
    """Return what was found on each bundle, by the bundle's folder.

    Raises:
        InputError: something was found on models that none of the bundles has; the message names one.

    """
    assigned: dict[str, list[Read[_Found]]] = {folder: [] for folder in manifests}
    for finding in found:
        assigned[_owner(manifests, finding)].append(finding)
    return assigned


def _owner(manifests: Mapping[str, Manifest], finding: Read[_Found]) -> str:
    label, recipe = finding.of
    named = {folder: m for folder, m in manifests.items() if (m.label, m.recipe) == finding.of}
    if not named:
        raise InputError(f"{finding.name} is of {label} with recipe {recipe!r}, which is none of the bundles.")
    if not finding.hashes or "" in finding.hashes.values():
        raise InputError(
            f"{finding.name} does not say by SHA-256 which models for MNN it is of: it was written by an earlier "
            "version, or is of other models. Measure again."
        )
    for folder, manifest in named.items():
        stored = {artifact.component: artifact.content for artifact in manifest.artifacts if artifact.kind == "mnn"}
        differing = [component for component, digest in finding.hashes.items() if stored.get(component) != digest]
        if not differing:
            return folder
    raise InputError(
        f"{finding.name} was found on another {differing[0].value} than the bundle's: its SHA-256 differs. "
        "Measure this bundle."
    )


def one_report(reports: Sequence[ReadReport]) -> Report | None:
    """Return the only report of a bundle; UsageError if there are several."""
    if len(reports) > 1:
        raise UsageError(f"{reports[0].name} and {reports[1].name} are of the same bundle. Give one of them.")
    return reports[0].found if reports else None
