"""Words of a manifest, each held to an alphabet, and its numbers to bounds: none is used before."""

import re
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from sa3_convert.untrusted import printable

_LONGEST: Final = 200


def of_alphabet(what: str, pattern: str) -> AfterValidator:
    """Return a validator of words of an alphabet."""
    form = re.compile(pattern)

    def held(value: str) -> str:
        if not form.fullmatch(value):
            raise ValueError(f"{value[:80]!r} is {what}")
        return value

    return AfterValidator(held)


def _shown(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"{value[:80]!r} cannot be shown")
    return value


_WORD = "[A-Za-z0-9][A-Za-z0-9._+-]"
Name = Annotated[str, of_alphabet("no name of up to 64 letters, digits and ._+-", f"{_WORD}{{,63}}")]
"""A word that may become part of paths."""
RelativePath = Annotated[
    str,
    Field(max_length=_LONGEST),
    of_alphabet("no plain path, or leaves the bundle", f"{_WORD}*(/{_WORD}*){{,7}}"),
]
Sha256 = Annotated[str, of_alphabet("no SHA-256", "[0-9a-f]{64}")]
Precision = Annotated[str, of_alphabet("no precision", "fp16|fp32|int[2-8]")]
Version = Annotated[str, of_alphabet("no version", r"[0-9]{1,4}(\.[0-9]{1,4}){1,3}")]
Text = Annotated[str, Field(max_length=_LONGEST), AfterValidator(_shown)]
"""What people are shown: where something came from."""
Label = Annotated[str, Field(max_length=1 << 16), AfterValidator(_shown)]
"""What a bundle is called, with its LoRAs."""
Decibels = Annotated[float, Field(ge=-1000, le=1000)]


def as_text(value: str) -> str:
    """Return a name from outside as a manifest can hold it."""
    return printable(value).replace("\n", "\\n")[:_LONGEST]
