"""`model_config.json` and the T5Gemma `config.json` in their published spelling: one set of models reads and writes.

A key that is absent means the reference constructor's default, never null. A setting that the networks here do not
implement is refused by its name: silently ignoring one would convert a different model. Objects that the reference
hands whole to a constructor may hold nothing unknown; from the others (`Picked`) it picks what it needs, and what it
never reads there (training, demos) is no concern here either. Fields stand in the order of the published files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from sa3_convert.checkpoint.dimensions import (
    DEFAULT_SHIFT,
    CheckpointLayout,
    NumberConditionerLayout,
    Objective,
    SampleRate,
    SampleSize,
    Seconds,
    Shift,
    Tokens,
    Width,
)
from sa3_convert.checkpoint.json_file import (
    Kept,
    No,
    Nothing,
    Picked,
    Unity,
    Unread,
    Whole,
    Yes,
    absent_is,
    faults,
    held,
    only,
    read_json,
)
from sa3_convert.checkpoint.network_config import Autoencoder, AutoencoderAlone, DitConfig, TextEncoderFile
from sa3_convert.errors import CheckpointError

CONFIG: Final = "model_config.json"
TEXT_ENCODER_FOLDER: Final = "t5gemma-b-b-ul2"
_FOURIER_FEATURES: Final = 256
_LARGEST: Final = 1 << 20
"""Bytes of a file; the published ones have a hundredth of it. All that is wrong with one is gathered in memory."""


class _Pretransform(Whole):
    type: Literal["autoencoder"]
    iterate_batch: Unread = None
    chunked: Unread = None
    config: Autoencoder
    enable_grad: Unread = None
    model_half: Unread = None
    scale: Unity = 1


class _PromptConfig(Whole):
    max_length: Tokens = 128
    padding_mode: Annotated[Literal["learned"], absent_is("zero")]
    repo_id: str | None = None
    subfolder: Literal["t5gemma-b-b-ul2"] = TEXT_ENCODER_FOLDER
    project_out: No = False
    model_name: Literal["google/t5gemma-b-b-ul2"] = "google/t5gemma-b-b-ul2"
    enable_grad: Unread = None
    model_path: Unread = None


class _Prompt(Whole):
    id: Literal["prompt"]
    type: Literal["t5gemma"]
    config: _PromptConfig


class _SecondsConfig(Whole):
    min_val: Annotated[Seconds, Kept] = 0
    max_val: Annotated[Seconds, Kept] = 1
    fourier_features_type: Annotated[Literal["expo"], absent_is("learned")]


class _SecondsTotal(Whole):
    id: Literal["seconds_total"]
    type: Literal["number"]
    config: _SecondsConfig


class _Conditioning(Whole):
    cond_dim: Width
    configs: Annotated[list[Annotated[_Prompt | _SecondsTotal, Field(discriminator="id")]], Field(max_length=16)]
    default_keys: Annotated[dict[str, Any], Field(default={}, max_length=0)]
    pre_encoded_keys: Nothing

    @model_validator(mode="after")
    def _has_each_once(self) -> Self:
        found = [config.id for config in self.configs]
        for name in ("prompt", "seconds_total"):
            if (count := found.count(name)) != 1:
                raise ValueError(f"configs has {count or 'no'} conditioner{'s' * (count > 1)} {name!r}, expected one")
        return self

    @property
    def prompt(self) -> _PromptConfig:
        """The text encoder's."""
        return next(one.config for one in self.configs if isinstance(one, _Prompt))

    @property
    def seconds(self) -> NumberConditionerLayout:
        """Dimensions of the other."""
        config = next(one.config for one in self.configs if isinstance(one, _SecondsTotal))
        low, high = float(config.min_val), float(config.max_val)
        return NumberConditionerLayout(low, high, features=_FOURIER_FEATURES, output_dim=self.cond_dim)


def _with_type(options: Any) -> Any:
    return {"type": "full", **options} if isinstance(options, dict) else options


class _Diffusion(Picked):
    type: Literal["dit"]
    diffusion_objective: Annotated[Objective, absent_is("v")]
    cross_attention_cond_ids: Annotated[list[Any], only(["prompt", "seconds_total"])]
    global_cond_ids: Annotated[list[Any], only(["seconds_total"])]
    local_add_cond_ids: Annotated[list[Any], only(["inpaint_mask", "inpaint_masked_input"])]
    mask_padding_attention: Annotated[Yes, absent_is(False)]
    use_effective_length_for_schedule: Unread = None
    distribution_shift_options: Unread = None
    config: DitConfig
    input_concat_ids: Nothing
    prepend_cond_ids: Nothing
    modular_local_cond_configs: Nothing
    sampling_distribution_shift_options: Annotated[Shift | None, BeforeValidator(_with_type)] = None


class _DiffusionModel(Picked):
    pretransform: _Pretransform
    conditioning: _Conditioning
    diffusion: _Diffusion
    io_channels: Width

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.io_channels != (dim := self.pretransform.config.latent_dim):
            raise ValueError(f"it contradicts itself: io_channels is {self.io_channels}, the latent_dim is {dim}")
        return self


class _File(Picked):
    # The reference builds the same model for both names of a diffusion model; the published files have the second.
    model_type: Literal["diffusion_cond", "diffusion_cond_inpaint", "autoencoder"]
    sample_size: SampleSize
    sample_rate: SampleRate
    audio_channels: Annotated[int, only(2)] = 2


class _AutoencoderFile(_File):
    model: AutoencoderAlone


class _DiffusionFile(_File):
    model: _DiffusionModel


def _config(data: Any) -> _AutoencoderFile | _DiffusionFile:
    if isinstance(data, dict) and data.get("model_type") == "autoencoder":
        return held(_AutoencoderFile, data, CONFIG)
    return held(_DiffusionFile, data, CONFIG)


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder says that it is a checkpoint."""
    return (folder / CONFIG).is_file()


def read_layout(folder: Path) -> CheckpointLayout:
    """Read the layout of the checkpoint in `folder`.

    Raises:
        CheckpointError: a file is missing or holds a setting that is not supported; the message names it.

    """
    data = read_json(folder / CONFIG, _LARGEST)
    try:
        return layout_of(data, lambda: _text_config(folder))
    except ValidationError as error:
        reason = faults(error, error.title)
    except ValueError as error:
        reason = str(error)
    raise CheckpointError(f"The configuration of {folder} cannot be used: {reason}.")


def _text_config(folder: Path) -> Any:
    path = folder / TEXT_ENCODER_FOLDER / "config.json"
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path.parent} is missing: the text encoder belongs to the checkpoint. "
            f"Download the folder {TEXT_ENCODER_FOLDER} beside model.safetensors."
        )
    return read_json(path, _LARGEST)


def layout_of(data: Any, text_data: Callable[[], Any]) -> CheckpointLayout:
    """Return the layout that configurations describe; the text encoder's is read if there is one."""
    config = _config(data)
    if isinstance(config, _AutoencoderFile):
        return CheckpointLayout(config.sample_rate, config.sample_size, config.model.layout())
    conditioning, diffusion = config.model.conditioning, config.model.diffusion
    prompt = conditioning.prompt
    text = held(TextEncoderFile, text_data(), f"{TEXT_ENCODER_FOLDER}/config.json")
    if text.encoder.sliding_window < prompt.max_length:
        raise ValueError(
            f"the text encoder's sliding_window {text.encoder.sliding_window} is shorter than the prompt's max_length "
            f"{prompt.max_length}; only windows that see the whole prompt are supported"
        )
    return CheckpointLayout(
        sample_rate=config.sample_rate,
        sample_size=config.sample_size,
        autoencoder=config.model.pretransform.config.layout(),
        dit=diffusion.config.layout(),
        text_encoder=text.layout(prompt.max_length),
        number_conditioner=conditioning.seconds,
        objective=diffusion.diffusion_objective,
        source_id=prompt.repo_id,
        sampling_shift=diffusion.sampling_distribution_shift_options or DEFAULT_SHIFT,
    )


def spelled_config(data: dict[str, Any]) -> dict[str, Any]:
    """Return a `model_config.json` as it is published, of what it says in any order."""
    return _config(data).model_dump(by_alias=True, exclude_unset=True)


def spelled_text_config(data: dict[str, Any]) -> dict[str, Any]:
    """Return a T5Gemma `config.json` as it is published, of what it says in any order."""
    return held(TextEncoderFile, data, "config.json").model_dump(by_alias=True, exclude_unset=True)
