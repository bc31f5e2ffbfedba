"""`report.json`: everything that a report says, and the one thing that its page and its summary are made from.

`docs/report.schema.json` is the JSON schema of `Report`.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sa3_convert.check.metrics import MAX_DB
from sa3_convert.components import Component
from sa3_convert.runtime.engines import EngineName

KIND: Final = "sa3-convert verification"


def _bounded(value: Any) -> Any:
    """Return a ratio within ±`MAX_DB`: infinity has no place in JSON. NaN stays, and is refused."""
    return max(-MAX_DB, min(MAX_DB, value)) if isinstance(value, float) and value == value else value


Decibels = Annotated[float, BeforeValidator(_bounded), Field(ge=-MAX_DB, le=MAX_DB)]


class _Data(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        from_attributes=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        populate_by_name=True,
    )


class Figures(_Data):
    """How close an output is to its reference."""

    signal_to_noise_db: Decibels
    """10·log10(Σ reference² / Σ (target − reference)²); 300 where the two are equal."""
    cosine: float
    max_abs_error: float
    mean_abs_error: float


class Spread(_Data):
    """Signal-to-noise ratios over many comparisons, in dB."""

    count: int
    mean: Decibels
    percentile_5: Decibels
    """Five in a hundred comparisons are below it."""
    worst: Decibels


class Case(Figures):
    """One comparison on sampled inputs."""

    case: str
    output: str
    """The output, or the part of it, that was compared."""


class StoredType(_Data):
    """Bytes of a file that are stored in one way."""

    type: str
    """fp32, fp16, int8, …; `scales` of integers; `structure`, which is all that is not data."""
    bytes: int


class ComponentReport(_Data):
    """One model on sampled inputs, against its floor."""

    component: Component
    engine: EngineName
    precision: str
    passed: bool
    """Whether it reached its floor here and, by its own error, in every generation, and the manifest is true."""
    floor_db: float
    claimed_db: Decibels | None
    """The worst ratio that the manifest names, from the conversion's own inputs."""
    measured_db: Decibels | None
    """The worst ratio on those same inputs now."""
    spread: Spread
    """Over the inputs, each by its worst output."""
    worst: Figures
    """The worst of each figure; they need not be of the same input."""
    worst_case: str
    replay: str
    """A command that looks into the worst case."""
    cases: tuple[Case, ...]
    bytes: int
    """Of the model's file and its companion."""
    stored: tuple[StoredType, ...]
    """What the bytes are, the most first; empty for a model without a storage audit."""


class StepSpread(Spread):
    """One denoising step over all generations."""

    step: int
    best: Decibels


class Observation(Figures):
    """One comparison within a generation."""

    case: str
    step: int | None


class Distribution(_Data):
    """One quantity over whole generations."""

    name: str
    component: Component
    spread: Spread
    floor_db: float | None
    """None for free-running generations, in which errors of the whole chain feed on themselves."""
    worst_case: str
    worst_step: int | None
    replay: str
    """A command that looks into the worst case."""
    by_step: tuple[StepSpread, ...]
    """Empty for what has no steps."""
    observations: tuple[Observation, ...]


class Generations(_Data):
    """Each model over whole generations."""

    engine: EngineName
    steps: int
    """Of the denoising loop."""
    distributions: tuple[Distribution, ...]


class AudioFigures(_Data):
    """How alike two pieces of audio are."""

    spectral_distance_db: tuple[float, ...]
    """One per entry of `windows`; 0 for the same audio."""
    mean_spectral_distance_db: float
    envelope_correlation: float
    loudness_db: float
    """Loudness less that of the reference, in LU."""
    width: float
    """Share of the side signal in the energy, less that of the reference."""


class Divergence(_Data):
    """How far one generation went from the reference's."""

    latent_cosine: float
    audio: AudioFigures


class EndToEndCase(_Data):
    """One generation from prompt to audio."""

    case: str
    prompt: str
    target: Divergence
    chaos: Divergence
    """The reference itself, its noise nudged."""


class EndToEnd(_Data):
    """From prompt to audio, beside the chaos floor."""

    nudge: float
    """Standard deviation of what is added to each draw of noise, whose own is 1."""
    windows: tuple[int, ...]
    """Samples per frame of the spectra."""
    chaos_ratio: float
    """Mean spectral distance of the target over that of the nudged reference."""
    judgement: str
    cases: tuple[EndToEndCase, ...]


class Operator(_Data):
    """One tensor that exists on both sides, and the operators that make it."""

    name: str
    onnx_operators: tuple[str, ...]
    mnn_operator: str
    stored: str
    """Coarsest type among the weights and constants that take part."""
    shape: tuple[int, ...]
    error_in_db: Decibels
    """Signal-to-noise ratio of its worst input."""
    error_out_db: Decibels
    own_error_db: Decibels
    """Against what the reference makes of the same inputs: the operator's own error."""
    limit_db: Decibels
    """What its storage allows."""
    is_faulty: bool


class Bisection(_Data):
    """A model operator by operator."""

    component: Component
    fell_short: bool
    """Whether the model was bisected because it fell short, at its worst case, rather than on sampled inputs."""
    verdict: str
    suspect: str | None
    operators: tuple[Operator, ...]
    incomparable: int
    """Tensors that were fused away, or whose names were lost."""
    replay: str
    """A command that bisects the model."""


class Problem(_Data):
    """Why a model failed."""

    what: str
    command: str
    """A command that looks into it."""


class NotRun(_Data):
    """Something that this report does not say, and the command that would find it out."""

    part: Literal["components", "generations", "end_to_end", "layers", "audio"]
    what: str
    command: str


class Change(_Data):
    """Something that is not what it was."""

    what: str
    before: str
    now: str


class Made(_Data):
    """What was verified, and with what."""

    bundle: str
    """Its folder, as it was given."""
    variant: str
    recipe: str
    checkpoint: str
    """Where the checkpoint came from."""
    digests: dict[str, str]
    """SHA-256 of each component's tensors in the checkpoint."""
    converted_with: dict[str, str]
    """Versions, from the manifest."""
    verified_with: dict[str, str]
    """Versions here and now."""
    bytes: int
    """Of all models that were verified."""


class Report(_Data):
    """One verification of one bundle."""

    schema_version: Literal[1] = Field(1, alias="schema")
    kind: Literal["sa3-convert verification"] = KIND
    passed: bool
    verdict: str
    """In a sentence."""
    problems: tuple[Problem, ...]
    """Empty if all models passed."""
    made: Made
    since_conversion: tuple[Change, ...]
    """Versions and figures that differ from those in the manifest."""
    since_report: tuple[Change, ...] | None
    """What differs from an earlier report; null without one."""
    components: tuple[ComponentReport, ...]
    generations: Generations | None
    end_to_end: EndToEnd | None
    bisections: tuple[Bisection, ...]
    not_run: tuple[NotRun, ...]

    def to_json(self) -> str:
        """Return the text of `report.json`."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"
