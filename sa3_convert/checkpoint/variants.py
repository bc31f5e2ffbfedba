"""The published checkpoints as data: where they are, their dimensions, limits and defaults. One table.

`full` dimensions are the published ones; `toy` ones give a checkpoint of a few MB with every construct of the real one.
Sources: the published model configs and the reference implementation's documentation.
"""

from dataclasses import dataclass
from typing import Literal

from sa3_convert.checkpoint.dimensions import CheckpointLayout, Objective
from sa3_convert.errors import UsageError

Family = Literal["small", "medium"]
Size = Literal["toy", "full"]
Sampler = Literal["pingpong", "euler"]

SAMPLE_RATE = 44100
LATENT_SAMPLES = 4096


@dataclass(frozen=True, slots=True)
class AutoencoderSize:
    """Widths and depths of a SAME autoencoder; both halves share them."""

    channels: int
    multiplier: int
    depth: int
    latent_dim: int
    sinusoidal_blocks: int


@dataclass(frozen=True, slots=True)
class DitSize:
    """Width and depth of the diffusion transformer."""

    width: int
    depth: int
    heads: int
    memory_tokens: int
    ff_mult: float


@dataclass(frozen=True, slots=True)
class TextEncoderSize:
    """Width and depth of the T5Gemma encoder."""

    vocab_size: int
    width: int
    inner: int
    depth: int
    heads: int
    head_dim: int
    query_pre_attn_scalar: int
    max_length: int


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Everything that differs between a toy and the published checkpoint of one family."""

    autoencoder: AutoencoderSize
    dit: DitSize
    text_encoder: TextEncoderSize


@dataclass(frozen=True, slots=True)
class Defaults:
    """How a model is sampled when nothing else is asked for."""

    sampler: Sampler
    steps: int
    guidance: float


DEFAULTS: dict[Objective, Defaults] = {
    "rf_denoiser": Defaults("pingpong", 8, 1.0),
    "rectified_flow": Defaults("euler", 50, 7.0),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One published checkpoint."""

    name: str
    hub_id: str
    revision: str
    """Commit that `checkpoint fetch` takes unless another is asked for."""
    family: Family
    objective: Objective | None
    """None for an autoencoder alone."""
    gated: bool
    sample_size: int
    """Longest output in samples, a multiple of 4096."""
    max_seconds: int

    @property
    def is_autoencoder(self) -> bool:
        """Whether it is an autoencoder alone."""
        return self.objective is None

    @property
    def is_base(self) -> bool:
        """Whether it is the form before post-training."""
        return self.objective == "rectified_flow"

    @property
    def content(self) -> str:
        """Name without `-base`: what the checkpoint was trained on (`small-music`, `small-sfx`, `medium`)."""
        return self.name.removesuffix("-base")


_SMALL, _SMALL_BASE, _MEDIUM = 1292 * LATENT_SAMPLES, 1300 * LATENT_SAMPLES, 4096 * LATENT_SAMPLES
_HUB = "stabilityai/stable-audio-3-"


def _post_trained(content: str, family: Family, sample_size: int, seconds: int, revision: str) -> Variant:
    return Variant(content, _HUB + content, revision, family, "rf_denoiser", True, sample_size, seconds)


def _base(content: str, family: Family, sample_size: int, seconds: int, revision: str) -> Variant:
    name = f"{content}-base"
    return Variant(name, _HUB + name, revision, family, "rectified_flow", False, sample_size, seconds)


_ALL = (
    _post_trained("small-music", "small", _SMALL, 120, "0fef1392cd842149a2b6d445e181c97608faac06"),
    _post_trained("small-sfx", "small", _SMALL, 120, "ae12755283df9d62ca39a9b050a39a0b607b8c20"),
    _post_trained("medium", "medium", _MEDIUM, 380, "27b5a21b791b1b033d193a9e1e3ce78493f102f9"),
    _base("small-music", "small", _SMALL_BASE, 120, "eab5ceee5ad9c1ed38800aff30a8e49d1161c539"),
    _base("small-sfx", "small", _SMALL_BASE, 120, "cc5ddb990e30daa68336ac61c140c37c7033ab7c"),
    _base("medium", "medium", _MEDIUM, 380, "b32993f73c3bdc3864043a72d8032606bba737c8"),
    Variant(
        "same-s",
        "stabilityai/SAME-S",
        "fbeb3dcf53a326e5682f38e22e7f740202d44232",
        "small",
        None,
        False,
        _SMALL,
        120,
    ),
    Variant(
        "same-l",
        "stabilityai/SAME-L",
        "41acf79dd242877d6499a1108ca5dba5d5eecfc5",
        "medium",
        None,
        False,
        _MEDIUM,
        380,
    ),
)

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}

_T5GEMMA_B = TextEncoderSize(
    vocab_size=256000,
    width=768,
    inner=2048,
    depth=12,
    heads=12,
    head_dim=64,
    query_pre_attn_scalar=64,
    max_length=256,
)
_TOY_T5GEMMA = TextEncoderSize(
    vocab_size=384, width=64, inner=160, depth=3, heads=2, head_dim=32, query_pre_attn_scalar=24, max_length=16
)
_TOY_DIT = DitSize(width=128, depth=2, heads=2, memory_tokens=4, ff_mult=2.0)


def _toy_autoencoder(sinusoidal_blocks: int) -> AutoencoderSize:
    return AutoencoderSize(channels=32, multiplier=4, depth=2, latent_dim=32, sinusoidal_blocks=sinusoidal_blocks)


DIMENSIONS: dict[tuple[Family, Size], Dimensions] = {
    ("small", "full"): Dimensions(
        autoencoder=AutoencoderSize(channels=128, multiplier=6, depth=6, latent_dim=256, sinusoidal_blocks=0),
        dit=DitSize(width=1024, depth=20, heads=16, memory_tokens=64, ff_mult=4),
        text_encoder=_T5GEMMA_B,
    ),
    ("medium", "full"): Dimensions(
        autoencoder=AutoencoderSize(channels=256, multiplier=6, depth=12, latent_dim=256, sinusoidal_blocks=8),
        dit=DitSize(width=1536, depth=24, heads=24, memory_tokens=64, ff_mult=4),
        text_encoder=_T5GEMMA_B,
    ),
    ("small", "toy"): Dimensions(_toy_autoencoder(0), _TOY_DIT, _TOY_T5GEMMA),
    ("medium", "toy"): Dimensions(_toy_autoencoder(2), _TOY_DIT, _TOY_T5GEMMA),
}


def variant_named(name: str) -> Variant:
    """Return a published variant.

    Raises:
        UsageError: there is none of this name; the message lists them.

    """
    try:
        return VARIANTS[name]
    except KeyError:
        raise UsageError(f"There is no variant {name!r}; known: {', '.join(VARIANTS)}.") from None


@dataclass(frozen=True, slots=True)
class PublishedNames:
    """The parts of published file names that differ between variants."""

    folder: str
    """Folder and middle of the names of what each variant has for itself: `music`, `sfx`, `medium`."""
    base: str
    """`_base` for the form before post-training."""
    codec: str
    """What tells SAME-L's files (`_medium`) from SAME-S's, whose names say nothing."""
    codec_folder: str
    """Folder of the encoder, which a family's variants share; SAME-S's lies with the music models."""


def published_names(variant: str) -> PublishedNames:
    """Return the parts of file names for a variant, published or `custom-…`.

    Source: the published MNN card, which has the small family; medium follows the same pattern.
    """
    content = variant.removesuffix("-base")
    known = VARIANTS.get(variant)
    sliding = known.family == "medium" if known else content == "custom-medium"
    folder = {"small-music": "music", "small-sfx": "sfx"}.get(content, content)
    codec = "medium" if sliding else ""
    base = "_base" if content != variant else ""
    return PublishedNames(folder, base, f"_{codec}" if codec else "", codec or "music")


def family_of(layout: CheckpointLayout) -> Family | None:
    """Return the family by construction, whatever the sizes: windows in chunks or sliding, attention plain or not."""
    sliding = layout.autoencoder.decoder.sliding_window is not None
    if layout.dit is not None and layout.dit.differential is not sliding:
        return None
    return "medium" if sliding else "small"


def recognise(layout: CheckpointLayout) -> Variant | None:
    """Return the published variant that a checkpoint is, or None for one that is none of them.

    Music, sound effects and medium are told apart by the hub id that the checkpoint names; base and post-trained by
    their objective, which stands in the checkpoint itself. An id that contradicts the construction is not believed.
    """
    family = family_of(layout)
    if layout.dit is None:
        return VARIANTS["same-l" if family == "medium" else "same-s"]
    by_id = {variant.hub_id: variant for variant in VARIANTS.values() if not variant.is_autoencoder}
    named = by_id.get(layout.source_id or "")
    if named is None or named.family != family:
        return None
    for variant in VARIANTS.values():
        if variant.content == named.content and variant.objective == layout.objective:
            return variant
    return None


def name_of(layout: CheckpointLayout) -> str:
    """Return the variant's name, or `custom-…` by construction and objective for a checkpoint that is none."""
    variant = recognise(layout)
    if variant is not None:
        return variant.name
    suffix = "-base" if layout.objective == "rectified_flow" else ""
    return f"custom-{family_of(layout) or 'mixed'}{suffix}"


def size_of(layout: CheckpointLayout) -> Literal["toy", "full", "custom"]:
    """Return which of the known dimensions a checkpoint has, by its autoencoder and, if it has one, its DiT."""
    auto, dit = layout.autoencoder, layout.dit
    for (family, size), known in DIMENSIONS.items():
        same = known.autoencoder
        width = same.channels * same.multiplier
        found = (auto.latent_dim, auto.decoder.width, auto.decoder.depth)
        if family != family_of(layout) or found != (same.latent_dim, width, same.depth):
            continue
        if dit is None or (dit.embed_dim, dit.depth) == (known.dit.width, known.dit.depth):
            return size
    return "custom"


def defaults_of(layout: CheckpointLayout) -> Defaults:
    """Return how a checkpoint is sampled by default, from its objective.

    Raises:
        UsageError: it is an autoencoder alone, which samples nothing.

    """
    if layout.objective is None:
        raise UsageError("This checkpoint holds an autoencoder alone; it cannot generate.")
    return DEFAULTS[layout.objective]
