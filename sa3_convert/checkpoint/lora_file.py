"""LoRA adapter files of Stable Audio 3, checked against a checkpoint before anything long.

A file is safetensors; its header's `lora_config` (JSON) gives rank, alpha, adapter_type and the filters include and
exclude. Its tensors are called `<layer>.parametrizations.weight.0.<factor>`, `<layer>` being a linear's or
convolution's path below the diffusion model or below the conditioner. Source: the published reference implementation.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from sa3_convert.checkpoint.json_file import listed, shown
from sa3_convert.checkpoint.lora_names import foreign_layers, foreign_settings, known_layer, settings_beside
from sa3_convert.checkpoint.tensor_file import TensorFile, refuse_pointer
from sa3_convert.checkpoint.tensors import DIT_PREFIX, SECONDS_PREFIX, Shape
from sa3_convert.errors import LoraError, UsageError
from sa3_convert.system import untrusted
from sa3_convert.system.checked_files import sha256_of_all
from sa3_convert.system.files import sha256_file

_KEY = re.compile(r"(?P<layer>.+)\.parametrizations\.weight\.0\.(?P<factor>\w+)")
_STRENGTH = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_NO_NUMBER = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_RANGE = re.compile(r"\[(\d+)-(\d+)\]", re.ASCII)
_LONGEST_FILTER = 10_000
_LARGEST_RANK = 2**31 - 1
_PICKLED_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PICKLED_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_UNUSED = frozenset({"lora_dropout_mask"})
"""Saved by some tools; means something in training only."""
_ROOTS: Final[Mapping[str, str]] = {"model.": "model.", "conditioners.": "conditioner."}
"""How a layer's path starts → what stands before it in the checkpoint."""
_ADAPTED: Final = (DIT_PREFIX, SECONDS_PREFIX)
"""The text encoder and the autoencoder are never adapted."""
_UNLIKE_THE_REFERENCE: Final[Mapping[str, tuple[Any, ...]]] = {
    "alpha_pattern": ({},),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "layer_replication": ([],),
    "lora_bias": (False,),
    "rank_pattern": ({},),
    "use_qalora": (False,),
}
"""Settings of PEFT that change what an adapter does → the values that do not. What else a file notes is no setting."""
_SYNONYMS: Final[Mapping[str, tuple[str, ...]]] = {"rank": ("r", "lora_rank"), "alpha": ("lora_alpha",)}


@dataclass(frozen=True, slots=True)
class LoraType:
    """What an adapter does to a weight [fan_out, fan_in]: a low-rank step, then magnitudes of rows, of columns."""

    bases_of_weight: bool = False
    """The step is U·M·Vᵀ with singular vectors of the unadapted weight ("-xs"), instead of B·A."""
    rows: str | None = None
    """Factor with a magnitude per row."""
    columns: str | None = None
    """Factor with a magnitude per column."""

    def factors(self, fan_out: int, fan_in: int, rank: int) -> dict[str, Shape]:
        """Return the factors that a layer must have, with their shapes."""
        step = {"M_xs": (rank, rank)} if self.bases_of_weight else {"lora_A": (rank, fan_in), "lora_B": (fan_out, rank)}
        magnitudes = {name: (size,) for name, size in ((self.rows, fan_out), (self.columns, fan_in)) if name}
        return {**step, **magnitudes}

    def optional(self, fan_out: int, fan_in: int, rank: int) -> dict[str, Shape]:
        """Return the factors that a layer may have: bases that were saved instead of being computed again."""
        return {"U": (fan_out, rank), "V": (fan_in, rank)} if self.bases_of_weight else {}


LORA_TYPES: Final[Mapping[str, LoraType]] = {
    f"{name}{suffix}": LoraType(bool(suffix), rows, columns)
    for suffix in ("", "-xs")
    for name, rows, columns in (
        ("lora", None, None),
        ("dora-rows", "magnitude", None),
        ("dora-cols", None, "magnitude"),
        ("bora", "magnitude_r", "magnitude_c"),
    )
}


@dataclass(frozen=True, slots=True)
class LoraRequest:
    """An adapter as asked for."""

    path: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str, option: str = "--lora") -> "LoraRequest":
        """Parse FILE or FILE:STRENGTH, which an option was given.

        Colons may be part of a file's name: an existing file is taken as it is.

        Raises:
            UsageError: no file is named, or the strength is not a finite number.

        """
        path, colon, strength = text.rpartition(":")
        if not colon or _exists(text):
            path, strength = text, "1"
        elif _NO_NUMBER.fullmatch(strength):
            raise UsageError(f"{option} {text}: the strength must be a finite number, not {strength}.")
        elif not _STRENGTH.fullmatch(strength):
            path, strength = text, "1"
        if not path:
            raise UsageError(f"{option} {text!r} names no file. Write FILE or FILE:STRENGTH.")
        if not math.isfinite(float(strength)):
            raise UsageError(f"{option} {text}: the strength must be a finite number, not {strength}.")
        try:
            return cls(Path(path).expanduser(), float(strength))
        except RuntimeError:
            raise UsageError(f"{option} {text}: there is no such home folder.") from None


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # a name longer than the system takes
        return False


@dataclass(frozen=True, slots=True)
class LoraFile:
    """An open adapter whose header is sound and whose values are finite."""

    tensors: TensorFile
    sha256: str
    """Of the file, and of the settings beside it where these are read; see `sha256_of_all`."""
    type_name: str
    rank: int
    alpha: float
    rank_stabilised: bool
    """Whether alpha is divided by √rank instead of by rank (rsLoRA)."""
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    layers: Mapping[str, Mapping[str, str]]
    """Factor → name in the file, by layer."""
    own: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """Rank and alpha of a layer of another trainer's file, which calls layers in its own way."""

    @property
    def path(self) -> Path:
        """Where it stands."""
        return self.tensors.path

    @property
    def type(self) -> LoraType:
        """What it does."""
        return LORA_TYPES[self.type_name]

    def rank_of(self, layer: str) -> int:
        """Return the rank of a layer."""
        return self.own[layer][0] if layer in self.own else self.rank

    def scale(self, layer: str, strength: float) -> float:
        """Return s, rounded to float32 as the reference does; out of its range it is infinite, which is found later."""
        rank, alpha = self.own.get(layer, (self.rank, self.alpha))
        divisor = math.sqrt(rank) if self.rank_stabilised else rank
        with np.errstate(over="ignore"):
            return float(np.float32(alpha / divisor) * np.float32(strength))

    def admits(self, layer: str) -> bool:
        """Tell whether the file's own filters let it change a layer."""
        return (self.include is None or contains_any(layer, self.include)) and not contains_any(layer, self.exclude)


def read_lora(path: Path) -> LoraFile:
    """Open an adapter file and check what does not depend on a checkpoint."""
    _refuse_pickle(path)
    tensors = TensorFile(path)
    if not tensors.entries:
        raise LoraError(f"{path} holds no tensors.")
    foreign = not any(_KEY.fullmatch(name) for name in tensors.entries)
    layers = foreign_layers(tensors) if foreign else _layers(tensors)
    beside = settings_beside(tensors) if foreign else None
    config = foreign_settings(tensors, layers, beside) if foreign else _config(tensors)
    own = _own(tensors, layers, config.get("alpha")) if foreign else {}
    type_name = config.get("adapter_type", "lora")
    if type_name == "dora":
        type_name = _dora_variant(tensors, layers)
    if not isinstance(type_name, str) or type_name not in LORA_TYPES:
        raise LoraError(f"{path} is of the type {shown(type_name)}; known: {', '.join(LORA_TYPES)}.")
    rank = config.get("rank", _rank(tensors, layers, any_of=foreign))
    if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
        raise LoraError(f"{path}: lora_config.rank is {shown(rank)}, expected a positive integer.")
    alpha = config.get("alpha", rank)
    if type(alpha) not in (int, float):
        raise LoraError(f"{path}: lora_config.alpha is {shown(alpha)}, expected a number.")
    rank_stabilised = config.get("use_rslora") or False
    if rank_stabilised not in (True, False):
        raise LoraError(f"{path}: lora_config.use_rslora is {shown(rank_stabilised)}, expected true or false.")
    _refuse_other_arithmetic(path, config, {"rank": rank, "alpha": alpha}, type_name)
    for layer in layers.values():
        for entry in layer.values():
            tensors.require_finite(entry)
    include, exclude = _filter(path, config, "include"), _filter(path, config, "exclude") or ()
    digest = sha256_of_all([sha256_file(one) for one in (path, beside) if one is not None])
    return LoraFile(
        tensors, digest, type_name, rank, float(alpha), bool(rank_stabilised), include, exclude, layers, own
    )


def _own(tensors: TensorFile, layers: dict[str, dict[str, str]], alpha: Any) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of each layer of another trainer's file, and take alphas out of the factors."""
    found = {}
    for layer, factors in layers.items():
        shape = tensors.entries[factors["lora_A"]].shape if "lora_A" in factors else ()
        rank = shape[0] if len(shape) == 2 else 0
        stated = factors.pop("alpha", None)
        if not rank or (stated is not None and tensors.entries[stated].shape not in ((), (1,))):
            raise LoraError(f"{tensors.path}: {layer} has no lora_A [rank, channels], or an alpha that is no number.")
        value = alpha if stated is None else float(tensors.array(stated).ravel()[0])
        # What is no number is refused where the file's alpha is.
        found[layer] = rank, float(value) if type(value) in (int, float) else float(rank)
    return found


def _refuse_other_arithmetic(path: Path, config: Mapping[str, Any], used: Mapping[str, Any], type_name: str) -> None:
    """Refuse settings under which the adapter would do something else than is done here."""
    unlike = dict(_UNLIKE_THE_REFERENCE) | {"use_dora": (type_name.startswith("dora"),)}
    unlike |= {other: (used[name],) for name, others in _SYNONYMS.items() for other in others}
    for key, supported in unlike.items():
        value = config.get(key)
        if value is not None and not any(value == one for one in supported):
            raise LoraError(
                f"{path}: lora_config.{key} is {shown(value)}, which is not supported; only "
                f"{' or '.join(map(repr, supported))} is."
            )


def _refuse_pickle(path: Path) -> None:
    refuse_pointer(path)
    with path.open("rb") as stream:
        start = stream.read(9)
    # A safetensors header's length may begin with the same bytes, but then the header follows.
    pickled = start.startswith(_PICKLED_STARTS) and not start.endswith(b"{")
    if path.suffix.lower() in _PICKLED_SUFFIXES or pickled:
        raise LoraError(
            f"{path} is a pickled file, which can run any program when it is read, so it is not read here. If you "
            "trust it, convert it once with the reference implementation: "
            "`from stable_audio_3.models.lora import convert_lora_ckpt_to_safetensors`, then "
            f'`convert_lora_ckpt_to_safetensors("{path.name}")`, and give the .safetensors file.'
        )


def _layers(tensors: TensorFile) -> dict[str, dict[str, str]]:
    layers: dict[str, dict[str, str]] = {}
    for name in tensors.entries:
        match = _KEY.fullmatch(name)
        if match is None:
            raise LoraError(
                f"{tensors.path} is no LoRA of Stable Audio 3: its tensor {name} is not called "
                "<layer>.parametrizations.weight.0.<factor>."
            )
        if match["factor"] not in _UNUSED:
            layers.setdefault(match["layer"], {})[match["factor"]] = name
    if not layers:
        raise LoraError(f"{tensors.path} holds no tensors.")
    return layers


def _config(tensors: TensorFile) -> dict[str, Any]:
    text = tensors.metadata.get("lora_config")
    if text is None:
        return {}
    try:
        config = untrusted.parse_json(text)
    except ValueError as error:
        raise LoraError(f"{tensors.path}: lora_config in its header is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise LoraError(f"{tensors.path}: lora_config in its header is no JSON object.")
    return config


def _dora_variant(tensors: TensorFile, layers: Mapping[str, Mapping[str, str]]) -> str:
    """Return which type an older file means by "dora": a magnitude [1, n] is one of columns, any other of rows."""
    magnitudes = [factors["magnitude"] for factors in layers.values() if "magnitude" in factors]
    shapes = [tensors.entries[name].shape for name in magnitudes]
    return "dora-cols" if shapes and all(len(shape) == 2 and shape[0] == 1 for shape in shapes) else "dora-rows"


def _rank(tensors: TensorFile, layers: Mapping[str, Mapping[str, str]], *, any_of: bool) -> int | None:
    """Return the rank that all layers have, or the largest of any, for a file that does not state it."""
    ranks = {
        tensors.entries[factors[factor]].shape[:1]
        for factors in layers.values()
        for factor in ("lora_A", "M_xs")
        if factor in factors
    }
    return max(ranks)[0] if ranks and (len(ranks) == 1 or any_of) and () not in ranks else None


def _filter(path: Path, config: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    patterns = config.get(key)
    if patterns is None:
        return None
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise LoraError(f"{path}: lora_config.{key} is {shown(patterns)}, expected a list of texts.")
    texts: list[str] = []
    for pattern in patterns:
        try:
            texts += expanded(pattern.strip())
        except ValueError as error:
            raise LoraError(f"{path}: lora_config.{key}: {error}") from None
        if len(texts) > _LONGEST_FILTER:
            raise LoraError(f"{path}: lora_config.{key} stands for more than {_LONGEST_FILTER} texts.")
    return tuple(texts)


def expanded(pattern: str) -> list[str]:
    """Return the texts that a filter stands for: `layers.[0-2]` is layers.0, layers.1, layers.2; ranges may fall."""
    literals = _RANGE.split(pattern)[::3]
    bounds = [(int(first), int(last)) for first, last in _RANGE.findall(pattern)]
    if math.prod(abs(last - first) + 1 for first, last in bounds) > _LONGEST_FILTER:
        raise ValueError(f"{shown(pattern)} stands for more than {_LONGEST_FILTER} texts")
    numbers = [range(min(pair), max(pair) + 1) for pair in bounds]
    return [
        literals[0] + "".join(f"{number}{literal}" for number, literal in zip(chosen, literals[1:], strict=True))
        for chosen in itertools.product(*numbers)
    ]


def contains_any(layer: str, texts: Sequence[str]) -> bool:
    """Tell whether a layer's path contains one of the texts: `layers.1` is in `layers.12` too, as in the reference."""
    return any(text in layer for text in texts)


def bind(lora: LoraFile, shapes: Mapping[str, Shape], checkpoint: str) -> dict[str, str]:
    """Return layer by name of the checkpoint's tensor, for every layer that the adapter changes.

    Args:
        lora: the adapter.
        shapes: of the checkpoint's tensors.
        checkpoint: what it is called.

    Raises:
        LoraError: it changes nothing, or does not fit; the message says why.

    """
    bound: dict[str, str] = {}
    problems: list[str] = []
    for layer in filter(lora.admits, lora.layers):
        name = (known_layer(layer, shapes) or layer) if layer in lora.own else _tensor_name(layer)
        if (twin := bound.setdefault(name, layer)) != layer:
            problems.append(f"{twin} and {layer} are the same layer")
    if not bound:
        raise LoraError(
            f"{lora.path} changes nothing: its own filters (include {list(lora.include or ())}, exclude "
            f"{list(lora.exclude)}) admit none of the {len(lora.layers)} layers that it holds."
        )
    for name, layer in bound.items():
        shape = shapes.get(name, ())
        if len(shape) < 2 or not name.startswith(_ADAPTED):
            problems.append(f"there is no layer {layer}")
        else:
            problems += _misfits(lora, layer, shape)
    if problems:
        raise LoraError(
            f"{lora.path} does not fit {checkpoint}: {listed(problems)}. Was it trained on another variant?"
        )
    return bound


def _tensor_name(layer: str) -> str:
    """Return a layer's weight in the checkpoint; a layer of unknown place keeps its name, which no tensor has."""
    prefix = next((prefix for root, prefix in _ROOTS.items() if layer.startswith(root)), None)
    return layer if prefix is None else f"{prefix}{layer}.weight"


def _misfits(lora: LoraFile, layer: str, shape: Shape) -> list[str]:
    """Return what is wrong with a layer's factors for a weight of this shape."""
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    wanted = lora.type.factors(fan_out, fan_in, lora.rank_of(layer))
    optional = lora.type.optional(fan_out, fan_in, lora.rank_of(layer))
    found = {factor: lora.tensors.entries[name].shape for factor, name in lora.layers[layer].items()}
    if lora.type.bases_of_weight and lora.rank > min(fan_out, fan_in):
        return [f"{layer}: rank {lora.rank} is above that of a weight {list(shape)}"]
    problems = [f"{layer} has no {factor}" for factor in wanted.keys() - found.keys()]
    problems += [
        f"{layer} has {factor}, which {lora.type_name} has not" for factor in found if factor not in wanted | optional
    ]
    if len(optional.keys() & found.keys()) == 1:
        problems.append(f"{layer} has one of U and V without the other")
    for factor, expected in (wanted | optional).items():
        actual = found.get(factor, expected)
        # Older files keep `magnitude` as a row or a column.
        flat = (math.prod(actual),) if factor == "magnitude" and len(actual) == 2 and 1 in actual else actual
        if flat != expected:
            problems.append(f"{layer}.{factor} has shape {list(actual)}, expected {list(expected)}")
    return problems
