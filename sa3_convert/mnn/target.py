"""The versions of MNN that a conversion can be for: the oldest one on which the result has to be right."""

from typing import Final, Literal

MnnVersion = Literal["3.0", "3.5", "3.6"]

DEFAULT_TARGET: Final[MnnVersion] = "3.6"
