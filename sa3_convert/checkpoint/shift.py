"""How a schedule is bent towards noise: the distribution shifts of the reference, spelled as in `model_config.json`.

A checkpoint may bring one (`sampling_distribution_shift_options`), and a request may replace it. Names and defaults of
the parameters are those of the reference's constructors. Lengths are in latents.
"""

import math
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from sa3_convert.checkpoint.json_file import Whole

_LARGEST_LOGSNR: Final = 16.0
"""Beyond it a float32 noise level is 0 or 1."""

Length = Annotated[int, Field(ge=1, le=1 << 20)]
LogSnr = Annotated[float, Field(ge=-_LARGEST_LOGSNR, le=_LARGEST_LOGSNR)]
Alpha = Annotated[float, Field(ge=0.01, le=100)]
Mu = Annotated[float, Field(ge=-10, le=10)]


class NoShift(Whole):
    """Noise levels fall in equal steps."""

    type: Literal["none"] = "none"


class LogSnrShift(Whole):
    """Log-SNR in equal steps, up to `logsnr_end`; it starts lower by `rate` for each doubling of the length."""

    type: Literal["logsnr"] = "logsnr"
    anchor_length: Length = 2000
    anchor_logsnr: LogSnr = -6.2
    """Where it starts at `anchor_length`."""
    rate: Annotated[float, Field(ge=-4, le=4)] = 1.0
    logsnr_end: LogSnr = 2.0

    def start(self, length: int) -> float:
        """Return the log-SNR that the schedule of a length starts at."""
        return self.anchor_logsnr - self.rate * math.log2(length / self.anchor_length)

    def fits(self, length: int) -> bool:
        """Tell whether the schedule of a length falls from noise to audio."""
        return -_LARGEST_LOGSNR <= self.start(length) < self.logsnr_end


class FluxShift(Whole):
    """The odds of noise, t / (1 − t), multiplied by alpha, which goes as a power of the length."""

    type: Literal["flux"] = "flux"
    min_length: Length = 256
    max_length: Length = 4096
    alpha_min: Alpha = 1.0
    alpha_max: Alpha = 1.0

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is above max_length {self.max_length}")
        if self.min_length == self.max_length and self.alpha_min != self.alpha_max:
            raise ValueError("one length (min_length equals max_length) has one alpha")
        return self


class FullShift(Whole):
    """The odds of noise multiplied by e to a power that goes linearly with the length; then a sine, if asked for."""

    type: Literal["full"] = "full"
    base_shift: Mu = 0.5
    max_shift: Mu = 1.15
    max_length: Length = 4096
    min_length: Length = 256
    use_sine: bool = False

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.min_length >= self.max_length:
            raise ValueError(f"min_length {self.min_length} is not below max_length {self.max_length}")
        return self


def _type_of(value: Any) -> str | None:
    """Return which shift is described; one that does not say is the full one, as in the reference."""
    found = value.get("type", "full") if isinstance(value, dict) else getattr(value, "type", None)
    return found if isinstance(found, str) else None


Shift = Annotated[
    Annotated[NoShift, Tag("none")]
    | Annotated[LogSnrShift, Tag("logsnr")]
    | Annotated[FluxShift, Tag("flux")]
    | Annotated[FullShift, Tag("full")],
    Discriminator(
        _type_of,
        custom_error_type="no_shift",
        custom_error_message="an object whose type is none, logsnr, flux or full",
    ),
]

DEFAULT_SHIFT: Final = LogSnrShift(rate=0.0)
"""Of a checkpoint that brings none: the same for every length."""
