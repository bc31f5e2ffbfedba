"""The published checkpoints as data: where they are, their dimensions, limits and defaults. One table.

`full` dimensions are the published ones; `toy` ones give a checkpoint of a few MB with every construct of the real one.
Sources: the published model configs and the reference implementation's documentation.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sa3_convert.checkpoint.dimensions import CheckpointLayout, Objective
from sa3_convert.errors import UsageError

Family = Literal["small", "medium"]
Size = Literal["toy", "full"]
Sampler = Literal["pingpong", "euler"]

MINIATURE = "sa3-convert/miniature"
"""What the very small trained model that comes with this package names as its own id."""
SAMPLE_RATE = 44100
LATENT_SAMPLES = 4096


Spelled = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What differs between a toy and the published checkpoint of one family, as the configuration files spell it."""

    autoencoder: Spelled
    """Of both halves."""
    sinusoidal_blocks: int
    dit: Spelled
    text_encoder: Spelled
    max_length: int
    """Of a prompt, in tokens."""


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


def _autoencoder(letter: str, family: Family, sample_size: int, seconds: int, revision: str) -> Variant:
    name = f"same-{letter.lower()}"
    return Variant(name, f"stabilityai/SAME-{letter}", revision, family, None, False, sample_size, seconds)


_ALL = (
    _post_trained("small-music", "small", _SMALL, 120, "0fef1392cd842149a2b6d445e181c97608faac06"),
    _post_trained("small-sfx", "small", _SMALL, 120, "ae12755283df9d62ca39a9b050a39a0b607b8c20"),
    _post_trained("medium", "medium", _MEDIUM, 380, "27b5a21b791b1b033d193a9e1e3ce78493f102f9"),
    _base("small-music", "small", _SMALL_BASE, 120, "eab5ceee5ad9c1ed38800aff30a8e49d1161c539"),
    _base("small-sfx", "small", _SMALL_BASE, 120, "cc5ddb990e30daa68336ac61c140c37c7033ab7c"),
    _base("medium", "medium", _MEDIUM, 380, "b32993f73c3bdc3864043a72d8032606bba737c8"),
    _autoencoder("S", "small", _SMALL, 120, "fbeb3dcf53a326e5682f38e22e7f740202d44232"),
    _autoencoder("L", "medium", _MEDIUM, 380, "41acf79dd242877d6499a1108ca5dba5d5eecfc5"),
)

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}
PINNED: dict[str, str] = {variant.hub_id: variant.revision for variant in _ALL}
"""Commit by hub id."""


def _same(channels: int, multiplier: int, depth: int, latent_dim: int) -> Spelled:
    return {
        "channels": channels,
        "c_mults": [multiplier],
        "transformer_depths": [depth],
        "latent_dim": latent_dim,
    }


def _dit(width: int, depth: int, heads: int, memory_tokens: int, ff_mult: float) -> Spelled:
    return {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "num_memory_tokens": memory_tokens,
        "ff_kwargs": {"mult": ff_mult},
    }


def _t5gemma(vocabulary: int, width: int, inner: int, depth: int, heads: int, head_dim: int, scalar: int) -> Spelled:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
    }


_T5GEMMA_B = _t5gemma(256000, 768, 2048, 12, 12, 64, 64)
_TOY = (_dit(128, 2, 2, 4, 2.0), _t5gemma(384, 64, 160, 3, 2, 32, 24), 16)

DIMENSIONS: dict[tuple[Family, Size], Dimensions] = {
    ("small", "full"): Dimensions(_same(128, 6, 6, 256), 0, _dit(1024, 20, 16, 64, 4), _T5GEMMA_B, 256),
    ("medium", "full"): Dimensions(_same(256, 6, 12, 256), 8, _dit(1536, 24, 24, 64, 4), _T5GEMMA_B, 256),
    ("small", "toy"): Dimensions(_same(32, 4, 2, 32), 0, *_TOY),
    ("medium", "toy"): Dimensions(_same(32, 4, 2, 32), 2, *_TOY),
}


def variant_named(name: str) -> Variant:
    """Return a published variant."""
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


def is_miniature(layout: CheckpointLayout) -> bool:
    """Whether it is the very small model that comes with this package, by what it names as its own id."""
    return layout.source_id == MINIATURE


def name_of(layout: CheckpointLayout) -> str:
    """Return the variant's name, or `miniature`, or `custom-…` by construction; all by objective."""
    variant = recognise(layout)
    if variant is not None:
        return variant.name
    suffix = "-base" if layout.objective == "rectified_flow" else ""
    name = "miniature" if is_miniature(layout) else f"custom-{family_of(layout) or 'mixed'}"
    return f"{name}{suffix}"


def size_of(layout: CheckpointLayout) -> Literal["toy", "full", "custom"]:
    """Return which of the known dimensions a checkpoint has, by its autoencoder and, if it has one, its DiT."""
    auto, dit = layout.autoencoder, layout.dit
    for (family, size), known in DIMENSIONS.items():
        same = known.autoencoder
        wanted = (same["latent_dim"], same["channels"] * same["c_mults"][0], *same["transformer_depths"])
        if family != family_of(layout) or (auto.latent_dim, auto.decoder.width, auto.decoder.depth) != wanted:
            continue
        if dit is None or (dit.embed_dim, dit.depth) == (known.dit["embed_dim"], known.dit["depth"]):
            return size
    return "custom"


def defaults_of(layout: CheckpointLayout) -> Defaults:
    """Return how a checkpoint is sampled by default, from its objective."""
    if layout.objective is None:
        raise UsageError("This checkpoint holds an autoencoder alone; it cannot generate.")
    return DEFAULTS[layout.objective]
