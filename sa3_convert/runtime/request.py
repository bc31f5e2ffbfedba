"""One generation: what is asked for, checked before any model is loaded."""

import dataclasses
import difflib
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np

from sa3_convert.arrays import Floats
from sa3_convert.checkpoint.dimensions import (
    DEFAULT_SHIFT,
    CheckpointLayout,
    LogSnrShift,
    Shift,
)
from sa3_convert.checkpoint.variants import defaults_of
from sa3_convert.errors import SettingError, UsageError
from sa3_convert.runtime.conditioning import (
    DEFAULT_SECONDS,
    PADDING_SECONDS,
    AudioSource,
    Lengths,
    Region,
    check_duration,
    check_regions,
    duration_of,
    lengths,
    looped,
    max_seconds,
)
from sa3_convert.runtime.levels import PeakName
from sa3_convert.runtime.loop import Loop
from sa3_convert.runtime.prompts import check_prompt
from sa3_convert.runtime.sampling import SamplerName, sigmas
from sa3_convert.runtime.setting_values import AUDIO, SHIFTS, AdapterRequest, read_value, shown

MAX_STEPS = 1000
DEFAULT_INIT_NOISE = 0.9
_MOST_PADDING = 600
_SOFTEST = -60
_SLOWEST, _FASTEST, _MOST_BEATS = 10, 1000, 1000


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """Settings of one generation. None stands for what suits the model; `resolved` fills it in.

    Raises:
        UsageError: a setting cannot be, or two contradict each other.

    """

    prompt: str
    seconds: float | None = None
    """As long as the given audio, and as far as `inpaint` reaches; 10 without any. A loop has its own."""
    bpm: float | None = None
    """Beats per minute of a loop; the prompt is to say them, too."""
    bars: int | None = None
    """A loop of so many bars: its end leads into its beginning. Given audio and regions to generate anew go round."""
    beats_per_bar: int | None = None
    """4 in a loop."""
    seed: int = 0
    """The same seed gives the same start noise on every engine and platform; only its low 32 bits count. In JSON also
    `random`: one that is drawn when it is read."""
    steps: int | None = None
    """8 for distilled models, 50 for base models."""
    sampler: SamplerName | None = None
    """Ping-pong for distilled models, Euler for base models."""
    cfg_scale: float | None = None
    """Guidance; 1 is none. 1 for distilled models, 7 for base models."""
    apg_scale: float = 1.0
    """0 … 1: how much of the guidance that is parallel to the estimate is removed."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest noise level at which there is guidance; at others the prompt alone is evaluated."""
    cfg_rescale: float = 0.0
    """0 … 1: how much of the loudness that guidance adds is taken back."""
    cfg_norm_threshold: float = 0.0
    """What guidance adds is no longer than this; 0 is no bound."""
    negative_prompt: str | None = None
    """What guidance moves away from, instead of from no prompt at all."""
    dist_shift: Shift | None = None
    """How the schedule is bent towards noise; the checkpoint's own, by default its log-SNR falls in equal steps."""
    duration_padding: float = PADDING_SECONDS
    """Seconds that are generated beyond the duration and not heard."""
    init_audio: AudioSource | None = None
    """Audio to start from instead of noise alone."""
    init_noise_level: float | None = None
    """0 (exclusive) … 1: how much of the initial audio is replaced by noise; 0.9 if there is any."""
    inpaint_audio: AudioSource | None = None
    """Audio of which everything is kept but `inpaint`."""
    inpaint: tuple[Region, ...] = field(default=())
    """What to generate anew, in seconds; may reach beyond the audio's end, which continues it."""
    peak: PeakName = "limit"
    """What becomes of peaks beyond full scale; see `levels`."""
    loudness: float | None = None
    """In LUFS; as it comes by default."""
    adapters: tuple[AdapterRequest, ...] = ()
    """LoRAs, in the order in which they are applied; the bundle needs slots for them."""

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        if self.negative_prompt is not None:
            check_prompt(self.negative_prompt, "negative_prompt")
        if self.seconds is not None:
            check_duration(self.seconds)
        self._check_loop()
        if not 0 <= self.seed < 1 << 64:
            raise SettingError("{seed} is {0}, not within 0 … 2⁶⁴ − 1.", self.seed)
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise SettingError("{steps} is {0}; give 1 to {1}.", self.steps, MAX_STEPS)
        if self.sampler is not None and self.sampler not in get_args(SamplerName):
            raise SettingError("{sampler} is {0!r}; give {1}.", self.sampler, " or ".join(get_args(SamplerName)))
        if self.peak not in get_args(PeakName):
            raise SettingError("{peak} is {0!r}; give {1}.", self.peak, " or ".join(get_args(PeakName)))
        if self.loudness is not None and not _SOFTEST <= self.loudness <= 0:
            raise SettingError("{loudness} is {0:g}; give LUFS from {1} to 0, such as -14.", self.loudness, _SOFTEST)
        for name, value in (("cfg_scale", self.cfg_scale), ("apg_scale", self.apg_scale)):
            if value is not None and not math.isfinite(value):
                raise SettingError(f"{{{name}}} is {{0}}, not a finite number.", value)
        self._check_guidance()
        self._check_audio()

    def _check_loop(self) -> None:
        if (self.bpm is None) != (self.bars is None):
            raise SettingError("{bpm} and {bars} belong together: they say how long a loop is.")
        loop = self.loop
        if loop is None:
            if self.beats_per_bar is not None:
                raise SettingError("{beats_per_bar} is of a loop; give {bpm} and {bars}, too.")
            return
        if not _SLOWEST <= loop.bpm <= _FASTEST:
            raise SettingError("{bpm} is {0}; give {1} to {2}.", loop.bpm, _SLOWEST, _FASTEST)
        for name, value in (("bars", loop.bars), ("beats_per_bar", loop.beats_per_bar)):
            if not 1 <= value <= _MOST_BEATS:
                raise SettingError(f"{{{name}}} is {{0}}; give 1 to {{1}}.", value, _MOST_BEATS)
        if self.seconds is not None and self.seconds != loop.seconds:
            raise SettingError("{seconds} contradicts {bpm} and {bars}, which make {0:g} seconds.", loop.seconds)

    def _check_guidance(self) -> None:
        low, high = self.cfg_interval
        if not 0 <= low <= high <= 1:
            raise SettingError(
                "{cfg_interval} {0:g}:{1:g} is none; noise levels are 0 (audio) to 1 (noise).", low, high
            )
        if not 0 <= self.cfg_rescale <= 1:
            raise SettingError("{cfg_rescale} is {0}; it must be within 0 (off) and 1.", self.cfg_rescale)
        if not 0 <= self.cfg_norm_threshold < math.inf:
            raise SettingError("{cfg_norm_threshold} is {0}; give 0 (off) or a finite norm.", self.cfg_norm_threshold)
        if not 0 <= self.duration_padding <= _MOST_PADDING:
            raise SettingError(
                "{duration_padding} is {0}; give 0 to {1} seconds.", self.duration_padding, _MOST_PADDING
            )
        if self.dist_shift is not None and not isinstance(self.dist_shift, get_args(SHIFTS)):
            raise SettingError("{dist_shift} is {0}, which is no shift.", reprlib.repr(self.dist_shift))

    def _check_audio(self) -> None:
        level = self.init_noise_level
        if level is not None and not 0 < level <= 1:
            raise SettingError("{init_noise_level} is {0}; it must be above 0 and at most 1 (all noise).", level)
        if level not in (None, 1) and self.init_audio is None:
            raise SettingError("{init_noise_level} needs {init_audio}, of which it says how much is kept.")
        if self.inpaint and self.inpaint_audio is None:
            raise SettingError("{inpaint} needs {inpaint_audio}, of which the rest is kept.")
        if self.inpaint_audio is not None and not self.inpaint:
            raise SettingError("{inpaint_audio} needs {inpaint}: at least one region to generate anew.")
        loop = self.loop
        check_regions(self.inpaint, loop.seconds if loop else math.inf if self.seconds is None else self.seconds)

    @property
    def loop(self) -> Loop | None:
        """The loop that is asked for, if it is one."""
        if self.bpm is None or self.bars is None:
            return None
        return Loop(self.bpm, self.bars, 4 if self.beats_per_bar is None else self.beats_per_bar)

    def files(self) -> list[Path]:
        """Return all files that it reads."""
        return [*self.audio_files(), *(adapter.path for adapter in self.adapters)]

    def audio_files(self) -> list[Path]:
        """Return the files of given audio."""
        return [audio for audio in (self.init_audio, self.inpaint_audio) if isinstance(audio, Path)]

    def lengths(self, layout: CheckpointLayout) -> Lengths:
        """Return the lengths of the generation; raise UsageError if the model cannot generate that much."""
        loop, limit = self.loop, max_seconds(layout)
        if loop is None:
            return lengths(layout, self.duration(layout), self.duration_padding)
        if loop.generated_seconds > limit:
            raise SettingError(
                "{bars} are too many: with the bar that is generated beyond a loop they last {0:.1f} seconds, and this "
                "model's limit is {1:.1f}.",
                loop.generated_seconds,
                limit,
            )
        return looped(lengths(layout, loop.generated_seconds, self.duration_padding), loop, layout.sample_rate)

    def duration(self, layout: CheckpointLayout) -> float:
        """Return how many seconds are to be heard; see `conditioning.duration_of` for where nobody says it."""
        if loop := self.loop:
            return loop.seconds
        if self.seconds is not None:
            return self.seconds
        return duration_of(layout, (self.init_audio, self.inpaint_audio), self.inpaint)

    def resolved(self, layout: CheckpointLayout) -> "ResolvedRequest":
        """Return the request with every default filled in; raise UsageError if it does not suit the model."""
        sizes = self.lengths(layout)
        shift = layout.sampling_shift if self.dist_shift is None else self.dist_shift
        if isinstance(shift, LogSnrShift) and not shift.fits(sizes.wanted):
            raise SettingError(
                "{dist_shift}: a schedule of {0} latents would start at a log-SNR of {1:.1f}, which must lie from -16 "
                "to below its end, {2:g}.",
                sizes.wanted,
                shift.start(sizes.wanted),
                shift.logsnr_end,
            )
        model = defaults_of(layout)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        defaults = {
            "seconds": self.duration(layout),
            "steps": model.steps,
            "sampler": model.sampler,
            "cfg_scale": model.guidance,
            "dist_shift": shift,
            "init_noise_level": 1.0 if self.init_audio is None else DEFAULT_INIT_NOISE,
        }
        return ResolvedRequest(**values | {key: value for key, value in defaults.items() if values[key] is None})

    def to_json(self, folder: Path | None = None) -> dict[str, Any]:
        """Return the settings as JSON values that `from_json` reads back.

        Args:
            folder: where they are to be written; relative paths are then named from there, as `located` reads them.

        Raises:
            ValueError: given audio is samples, not a file.

        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in AUDIO:
            if isinstance(values[name], np.ndarray):
                raise ValueError(f"{name} is an array; only audio that stands in a file can be written down")
            values[name] = None if values[name] is None else _named_from(folder, values[name])
        # What follows from others would contradict them when one of them is replaced.
        values["seconds"] = None if self.loop else self.seconds
        values["inpaint"] = [list(region) for region in self.inpaint]
        values["adapters"] = [str(replace(a, path=Path(_named_from(folder, a.path)))) for a in self.adapters]
        values["cfg_interval"] = list(self.cfg_interval)
        values["dist_shift"] = None if self.dist_shift is None else self.dist_shift.model_dump()
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read settings.

        Raises:
            UsageError: a key is unknown (the nearest known one is named), or a value of the wrong kind or not valid.

        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Perhaps you meant {near[0]!r}." if near else ""
                raise UsageError(f"There is no setting {shown(key)}.{hint}")
        if "prompt" not in values:
            raise SettingError("{prompt} is missing.")
        return cls(**{key: read_value(key, value, optional=key in _OPTIONAL) for key, value in values.items()})


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedRequest(GenerateRequest):
    """A request without open settings; made by `GenerateRequest.resolved`."""

    seconds: float = DEFAULT_SECONDS
    steps: int = 8
    sampler: SamplerName = "pingpong"
    cfg_scale: float = 1.0
    dist_shift: Shift = DEFAULT_SHIFT
    init_noise_level: float = 1.0

    @property
    def generated_seconds(self) -> float:
        """What the model is asked for; of a loop it is more than what is heard."""
        loop = self.loop
        return loop.generated_seconds if loop else self.seconds

    def schedule(self, sizes: Lengths) -> Floats:
        """Return the noise levels of the steps, and 0."""
        return sigmas(self.steps, self.init_noise_level, self.dist_shift, sizes.wanted)

    def contradictions(self, sizes: Lengths) -> list[str]:
        """Return, as sentences, which settings have no effect beside the others."""
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        if self.cfg_scale == 1:
            idle = [words for name, words in _GUIDANCE.items() if getattr(self, name) != usual[name]]
            return [f"{words} has no effect without guidance (a scale of 1)." for words in idle]
        low, high = self.cfg_interval
        if any(low <= sigma <= high for sigma in self.schedule(sizes)[:-1]):
            return []
        return [f"No step starts at a noise level within {low:g}:{high:g}, so there is no guidance."]


_GUIDANCE = {
    "negative_prompt": "The negative prompt",
    "apg_scale": "The scale of APG",
    "cfg_interval": "The interval of guidance",
    "cfg_rescale": "Rescaling guidance",
    "cfg_norm_threshold": "The norm threshold of guidance",
}
_OPTIONAL = tuple(f.name for f in dataclasses.fields(GenerateRequest) if f.default is None)


def located(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings that stand in a file of this folder, their relative paths leading from where we are."""
    paths = {name: values[name] for name in AUDIO if isinstance(values.get(name), str)}
    found = {**values, **{name: str(folder / path) if path else path for name, path in paths.items()}}
    if isinstance(adapters := values.get("adapters"), list):
        # Text that begins with a path: nothing comes before it.
        found["adapters"] = [str(folder / text) if isinstance(text, str) and text else text for text in adapters]
    return found


def _named_from(folder: Path | None, path: Path) -> str:
    """Return how a relative path is written in a file of this folder."""
    if folder is None or path.is_absolute():
        return str(path)
    try:
        return os.path.relpath(path, folder)
    except ValueError:
        # On another drive of Windows.
        return str(path.absolute())
