"""Bundles side by side as Markdown, from what their manifests say."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sa3_convert.bundle.manifest import Artifact, Label, Name, Sha256, Text
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.json_file import faults
from sa3_convert.components import Component
from sa3_convert.errors import InputError, UsageError
from sa3_convert.system.untrusted import parse_json, read_text


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


Seconds = Annotated[float, Field(ge=0, le=1e9)]
Count = Annotated[int, Field(ge=0, le=16 << 40)]


class _Seconds(_Data):
    text_encoder: Seconds
    number_conditioner: Seconds
    dit: Seconds
    decoder: Seconds
    other: Seconds
    total: Seconds


class Machine(_Data):
    """What something was measured on; what its system does not tell is None."""

    processor: Text | None = None
    instructions: tuple[Name, ...] = ()
    usable_cores: Count | None = None
    memory_bytes: Count | None = None
    system: Text | None = None
    versions: dict[Name, Text] = Field(default_factory=dict)


class _Engine(_Data):
    threads: Count | None = None
    """None is one for each core."""


class BenchRow(_Data):
    """What is shown of one engine at one duration."""

    engine: Name
    duration: float = Field(ge=0, le=1e9)
    """Seconds of audio."""
    temperature: Literal["cold", "warm"]
    seconds: _Seconds
    real_time_factor: float = Field(ge=0, le=1e9)
    """Seconds of audio per second of work."""
    peak_bytes: Count | None
    device_bytes: Count | None = None
    """Of GPUs' memory, where NVML told."""


class Bench(_Data):
    """What `bench --json` found of one bundle."""

    variant: Label
    """With its LoRAs, as the manifest's label has it."""
    recipe: Name
    models: dict[Component, Sha256] = Field(default_factory=dict)
    """SHA-256 of the models for MNN; none in a file of an earlier version."""
    machine: Machine
    repeats: Count
    steps: Count | None
    """Denoising steps; None is what suits the model."""
    engines: dict[Name, _Engine]
    rows: tuple[BenchRow, ...] = Field(min_length=1, max_length=1000)

    @classmethod
    def read(cls, path: Path) -> "Bench":
        """Read a file that `bench --json` wrote; InputError if it is something else."""
        return _read(cls, path, "no result of `sa3-convert bench --json`")

    def columns(self) -> dict[tuple[str, float], BenchRow]:
        """Return the warm rows by engine and duration."""
        return {(row.engine, row.duration): row for row in self.rows if row.temperature == "warm"}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PeerRow(_Strict):
    """Another program's seconds for one duration: of the whole, of stages, or both."""

    duration: float = Field(gt=0, le=1e9)
    """Seconds of audio."""
    total: float | None = Field(None, gt=0, le=1e9)
    """The sum of the stages where it is not told."""
    load: Seconds | None = None
    text_encoder: Seconds | None = None
    dit_step: Seconds | None = None
    """One run of the DiT."""
    dit: Seconds | None = None
    decoder: Seconds | None = None
    other: Seconds | None = None
    peak_bytes: Count | None = None

    @model_validator(mode="after")
    def _has_a_time(self) -> Self:
        if not self.seconds:
            raise ValueError(f"{self.duration:g} s of audio have neither a total nor stages")
        return self

    @property
    def seconds(self) -> float:
        """The whole generation."""
        stages = (self.load, self.text_encoder, self.dit, self.decoder, self.other)
        return self.total or sum(stage or 0.0 for stage in stages)


class Peer(_Strict):
    """What another program was measured to take, to be shown beside ours: `bench --peer`."""

    name: Name
    machine: Text
    """What it ran on, in words."""
    rows: tuple[PeerRow, ...] = Field(min_length=1, max_length=100)

    @classmethod
    def read(cls, path: Path) -> "Peer":
        """Read a file of times; InputError if it is something else, with the key that is wrong."""
        return _read(cls, path, "no file of a peer's times (name, machine and rows; see the guide)")


_Model = TypeVar("_Model", Bench, Peer)


def _read(kind: type[_Model], path: Path, otherwise: str) -> _Model:
    try:
        text = read_text(path)
        # Twice: what pydantic would take in silence (two keys of one name) is refused first.
        parse_json(text)
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{path} is {otherwise}: {faults(error)}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is {otherwise}: {error}") from None


def markdown_table(bundles: Sequence[Bundle], benches: Sequence[Bench] = ()) -> str:
    """Return one row per bundle: variant and LoRAs, recipe, size and fidelity of each component, size of all models.

    Fidelity is the worst signal-to-noise ratio, in dB, that the conversion measured against ONNX Runtime on the fp32
    reference. Components that no bundle has get no column; one that a bundle lacks is a dash. `at low` names those that
    a runtime can compute with half floats, which costs them little. Each engine and duration
    that was measured adds a column: the whole generation's time with the models kept, and the peak memory of a process
    that loads each model for its stage.

    Raises:
        UsageError: something was measured on a bundle that is not in the table, or twice.

    """
    measured = {(bench.variant, bench.recipe): bench.columns() for bench in benches}
    _check_measured(measured.keys(), benches, bundles)
    present = {component for bundle in bundles for component in bundle.components}
    components = [component for component in Component if component in present]
    speeds = sorted({key for columns in measured.values() for key in columns}, key=lambda key: (key[1], key[0]))
    header = ["variant", "recipe", *(component.value for component in components), "all", "at low"]
    header += [f"{duration:g} s by {engine}" for engine, duration in speeds]
    rows = [header, ["---"] * len(header)]
    for bundle in bundles:
        columns = measured.get((bundle.manifest.label, bundle.manifest.recipe), {})
        rows.append([*_row(bundle, components), *(_speed(columns.get(key)) for key in speeds)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown_text(text: str) -> str:
    """Return text that Markdown shows as it stands, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def markdown_code(text: str) -> str:
    """Return text from outside as a code span of one line, in which no Markdown, HTML or address means anything."""
    shown = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if len(fence) > 1 or not shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _check_measured(keys: Collection[tuple[str, str]], benches: Sequence[Bench], bundles: Sequence[Bundle]) -> None:
    known = {(bundle.manifest.label, bundle.manifest.recipe) for bundle in bundles}
    for variant, recipe in keys:
        if (variant, recipe) not in known:
            raise UsageError(f"--bench: {variant} with recipe {recipe!r} was measured, which is none of the bundles.")
    if len(keys) < len(benches):
        raise UsageError("--bench: two files are of the same variant and recipe.")


def _speed(row: BenchRow | None) -> str:
    if row is None:
        return "–"
    time = f"{row.seconds.total:.1f} s"
    return time if row.peak_bytes is None else f"{time}, {row.peak_bytes / 2**20:.0f} MiB"


def _row(bundle: Bundle, components: Sequence[Component]) -> list[str]:
    models = {component: bundle.artifact(component) for component in bundle.components}
    cells = [_cell(models[component]) if component in models else "–" for component in components]
    total = sum(model.total_bytes for model in models.values())
    return [
        markdown_text(bundle.manifest.label),
        f"`{bundle.manifest.recipe}`",
        *cells,
        f"{total / 2**20:.1f} MiB",
        _right_at_low(models),
    ]


def _cell(model: Artifact) -> str:
    size = f"{model.total_bytes / 2**20:.1f} MiB"
    return size if model.fidelity is None else f"{size}, {model.fidelity.signal_to_noise_db:.1f} dB"


def _right_at_low(models: Mapping[Component, Artifact]) -> str:
    """Return which components can run with half floats, "–" if that is known of none."""
    if all(model.half_db is None for model in models.values()):
        return "–"
    return ", ".join(c.value for c, model in models.items() if model.lowest_precision == "low") or "none"
