"""`report.json`: everything that a report says, and the one thing that its page and its summary are made from.

`docs/report.schema.json` is the JSON schema of `Report`; what was measured has the classes of the verification itself.
"""

from typing import Annotated, Final, Literal, get_args

from pydantic import Field, StringConstraints

from sa3_convert.check.results import Data, Decibels, Figures, Measurement, Spread
from sa3_convert.components import Component
from sa3_convert.lab.generations.distribution import Observation
from sa3_convert.lab.generations.end_to_end import EndToEnd
from sa3_convert.lab.miniature.judge import Recognition
from sa3_convert.runtime.engines import EngineName

Kind = Literal["sa3-convert verification"]
KIND: Final = get_args(Kind)[0]


class StoredType(Data):
    """Bytes of a file that are stored in one way."""

    type: str
    """fp32, fp16, int8, …; `scales` of integers; `structure`, which is all that is not data."""
    bytes: int


class ModelFile(Data):
    """One file of a model."""

    path: str
    """In the bundle."""
    bytes: int
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class ReportedModel(Data):
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
    cases: tuple[Measurement, ...]
    bytes: int
    """Of the model's file and its companion."""
    files: tuple[ModelFile, ...] = ()
    """Empty in a report of an earlier version."""
    stored: tuple[StoredType, ...]
    """What the bytes are, the most first; empty for a model without a storage audit."""

    @property
    def name(self) -> str:
        """The component, with its engine where that is not MNN."""
        return self.component.value if self.engine == "mnn" else f"{self.component.value}, {self.engine}"


class StepSpread(Spread):
    """One denoising step over all generations."""

    step: int
    best: Decibels


class ReportedDistribution(Data):
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

    @property
    def place(self) -> str:
        """The worst case, with its step."""
        return self.worst_case + ("" if self.worst_step is None else f" step={self.worst_step}")


class Generations(Data):
    """Each model over whole generations."""

    engine: EngineName
    steps: int
    """Of the denoising loop."""
    distributions: tuple[ReportedDistribution, ...]


class Operator(Data):
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


class Bisection(Data):
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


class Problem(Data):
    """Why a model failed."""

    what: str
    command: str
    """A command that looks into it."""


class NotRun(Data):
    """Something that this report does not say, and the command that would find it out."""

    part: Literal["components", "generations", "end_to_end", "layers", "audio"]
    what: str
    command: str


class Change(Data):
    """Something that is not what it was."""

    what: str
    before: str
    now: str


class Made(Data):
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


class Report(Data):
    """One verification of one bundle."""

    schema_version: Literal[1] = Field(1, alias="schema")
    kind: Kind = KIND
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
    components: tuple[ReportedModel, ...]
    generations: Generations | None
    end_to_end: EndToEnd | None
    recognitions: tuple[Recognition, ...] = ()
    """Of the miniature."""
    bisections: tuple[Bisection, ...]
    not_run: tuple[NotRun, ...]

    def to_json(self) -> str:
        """Return the text of `report.json`."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"
