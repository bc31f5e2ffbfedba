"""Under which licences converted models are: said in a card, and in the NOTICE beside them."""

from collections.abc import Collection
from typing import Final

from sa3_convert.bundle.manifest import Manifest
from sa3_convert.checkpoint.variants import is_miniature

_LICENCE: Final = """\
Stable Audio 3, and what is converted from it, is under the
[Stability AI Community License](https://stability.ai/license)."""
_MINIATURE: Final = "The miniature was trained by sa3-convert, and is under its licence, Apache-2.0."
_GEMMA: Final = """\
The text encoder is T5Gemma, under the [Gemma Terms of Use](https://ai.google.dev/gemma/terms). Both apply."""
_NOTICE: Final = """\
Converted and quantised from Stable Audio 3 by sa3-convert; the weights were changed by that.

This Stability AI Model is licensed under the Stability AI Community License, Copyright © Stability AI Ltd. All Rights
Reserved. The licence: https://stability.ai/license
Powered by Stability AI

The text encoder is T5Gemma. Gemma is provided under and subject to the Gemma Terms of Use found at
ai.google.dev/gemma/terms
"""
_NOTICE_OF_MINIATURE: Final = """\
The miniature was trained, converted and quantised by sa3-convert, and is under its licence, Apache-2.0.
"""


def licences(manifests: Collection[Manifest]) -> list[str]:
    """Return what a card says, in Markdown."""
    others = [manifest for manifest in manifests if not is_miniature(manifest.layout)]
    lines = [_MINIATURE] if len(others) < len(manifests) else []
    lines += [_LICENCE] if others else []
    return [*lines, *([_GEMMA] if generates(others) else [])]


def notice(manifests: Collection[Manifest]) -> str:
    """Return the text of the NOTICE."""
    ours = {is_miniature(manifest.layout) for manifest in manifests}
    return "\n".join(text for text, own in ((_NOTICE, False), (_NOTICE_OF_MINIATURE, True)) if own in ours)


def generates(manifests: Collection[Manifest]) -> bool:
    """Whether one is more than an autoencoder alone."""
    return any(manifest.layout.dit is not None for manifest in manifests)
