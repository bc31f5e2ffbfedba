"""Names of published files: those of the seed card's tree, and the slots that its client opens in a flat folder.

In the tree a name states a precision only where the audited file has it: a text encoder of eight bits is never called
`…_int4`. Small variants share one autoencoder and medium ones another. Text encoders differ by the padding embedding
inside them: with several variants each gets its own, beside its DiT.

In a flat folder the names are slots: what a client opens under its flags, whatever stands there. Which precision each
slot holds is said beside it.

A model with adapters in it carries a tag in its name, after the variant: their names, in letters that every file system
and web server takes, and the start of a hash of their contents and strengths. It never lies under a shared name. What
adapters leave alone is the plain model, and keeps its name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sa3_convert.bundle.manifest import LoraEntry, Manifest
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.variants import published_names
from sa3_convert.components import TEXT_TO_AUDIO, Component
from sa3_convert.errors import BundleError
from sa3_convert.system.sealed import fingerprint

SHARED = (Component.TEXT_ENCODER, Component.DECODER, Component.ENCODER)
"""Components for which the published tree has one file for all variants."""
_LONGEST_NAME: Final = 24
_MOST_NAMES: Final = 3


def family_folder(manifest: Manifest) -> str:
    """Return the folder of a variant with its adapters: `music`, `music_base`, `music_warm-…`."""
    names = published_names(manifest.variant)
    return f"{names.folder}{names.base}{_tag(manifest.loras)}"


def published_path(
    variant: str, component: Component, precision: str, *, own: bool = False, loras: Sequence[LoraEntry] = ()
) -> str:
    """Return a model's path in the published hub tree, by its audited precision and the adapters that change it.

    `own` says that the variant has weights of its own where the tree has one file for all variants.
    """
    names = published_names(variant)
    family, base = names.folder, names.base + _tag(loras)
    folder = f"{family}{base}/{precision}"
    if (own or loras) and component in SHARED:
        return f"{folder}/{component.value}_{family}{base}_{precision}.mnn"
    match component:
        case Component.TEXT_ENCODER:
            return "shared/text_encoder.mnn" if precision.startswith("fp") else f"shared/text_encoder_{precision}.mnn"
        case Component.DECODER:
            return f"shared/decoder{names.codec}_fused_wn.mnn"
        case Component.ENCODER:
            suffix = "" if precision.startswith("fp") else f"_{precision}"
            return f"{names.codec_folder}/{precision}/encoder{names.codec}{suffix}.mnn"
        case Component.DIT:
            suffix = "_v2_f32io" if precision == "fp16" else ""
            return f"{folder}/dit_{family}{base}_{precision}{suffix}.mnn"
        case Component.NUMBER_CONDITIONER:
            return f"{folder}/number_conditioner_{family}{base}_{precision}.mnn"


def _tag(loras: Sequence[LoraEntry]) -> str:
    """Return what names say of adapters: nothing of none; names are for people, the hash tells sets apart."""
    if not loras:
        return ""
    names = (re.sub(r"[^a-z0-9]+", "-", Path(lora.name).stem.lower())[:_LONGEST_NAME].strip("-") for lora in loras)
    known = [name or "lora" for name in names]
    shown = known[:_MOST_NAMES] + ([f"{len(known) - _MOST_NAMES}-more"] if len(known) > _MOST_NAMES else [])
    exact = fingerprint(loras=[[lora.sha256, lora.strength] for lora in loras])
    return f"_{'-'.join(shown)}-{exact[:12]}"


@dataclass(frozen=True, slots=True)
class Slot:
    """What the published client opens for a component, {} standing for its variant: without a flag, and with it."""

    flag: str
    without: str
    given: str


_INT8, _FLOAT_TEXT = "--mnn-int8", "--mnn-t5-fp32"

SLOTS: Mapping[Component, Slot] = {
    Component.TEXT_ENCODER: Slot(_FLOAT_TEXT, "text_encoder_int4.mnn", "text_encoder.mnn"),
    Component.NUMBER_CONDITIONER: Slot(_INT8, "number_conditioner_{}_fp16.mnn", "number_conditioner_{}_int8.mnn"),
    # Of `…_fp16_v2_f32io.mnn` and this one it opens this one first, and others open nothing else.
    Component.DIT: Slot(_INT8, "dit_{}_fp16_f32io.mnn", "dit_{}_int8.mnn"),
    Component.DECODER: Slot(_INT8, "decoder_fused_wn.mnn", "decoder_fused_wn.mnn"),
    Component.ENCODER: Slot(_INT8, "encoder.mnn", "encoder_int8.mnn"),
}
"""Source: stable-audio-3-rs, which takes `--variant sm-music`, `sm-sfx` or another name as it is."""


def client_flags(precisions: Mapping[Component, str]) -> tuple[str, ...]:
    """Return the flags under which the client opens models of these precisions: integers unless it is told otherwise.

    Floating-point text encoders take their flag, a DiT of integers takes its own.
    """
    int8 = (_INT8,) if precisions[Component.DIT].startswith("int") else ()
    return int8 + ((_FLOAT_TEXT,) if precisions[Component.TEXT_ENCODER].startswith("fp") else ())


def slot_name(variant: str, component: Component, flags: Sequence[str]) -> str:
    """Return the name that the client opens for a component under its flags."""
    slot = SLOTS[component]
    return (slot.given if slot.flag in flags else slot.without).format(published_names(variant).folder)


def client_variant(variant: str) -> str:
    """Return what the client's `--variant` has to be."""
    folder = published_names(variant).folder
    return f"sm-{folder}" if variant.startswith("small-") else folder


def check_client_runs(bundle: Bundle) -> None:
    """Refuse what the client would not start with, or sample as what it is not."""
    manifest = bundle.manifest
    if manifest.layout.dit is None or manifest.layout.objective != "rf_denoiser":
        raise BundleError(
            f"{bundle.path} is {manifest.variant}; the client samples post-trained models alone, in eight ping-pong "
            "steps. Use --layout hub, or convert the checkpoint without -base in its name."
        )
    missing = [component.value for component in TEXT_TO_AUDIO if component not in bundle.components]
    missing += [] if any(a.kind == "tokenizer" for a in manifest.artifacts) else ["tokenizer"]
    if missing:
        raise BundleError(
            f"{bundle.path} has no {', '.join(missing)}, without which the client does not start. Convert the whole "
            "checkpoint (without --component), or use --layout hub."
        )
