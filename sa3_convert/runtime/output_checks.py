"""Is what was generated audio at all? Checks that watch it as it is made."""

from collections.abc import Collection
from typing import Literal, get_args

import numpy as np

from sa3_convert.arrays import Floats
from sa3_convert.errors import OutputRejectedError, UsageError

CheckName = Literal["non-finite", "silence", "constant", "clipping", "duration", "duplicate"]
CHECKS: tuple[CheckName, ...] = get_args(CheckName)

# Half a step of 16 bits: what a CD could not hold.
SILENCE_PEAK = 2.0**-16
CONSTANT_SPAN = 2.0**-16
"""A channel whose values lie closer together than this is constant."""
CLIPPING_SHARE = 0.10
"""Loud masters clip a few in a thousand samples; a model that has come apart clips most."""


class OutputCheck:
    """Watches the audio of one generation as it is made; a finding raises OutputRejectedError unless it is allowed."""

    def __init__(self, allow: Collection[str] = ()) -> None:
        if unknown := sorted(set(allow) - set(CHECKS)):
            raise UsageError(f"There is no output check {unknown[0]!r}. There are: {', '.join(CHECKS)}.")
        self._allow = frozenset(allow)
        self._samples = 0
        self._values = 0
        self._clipped = 0
        self._low: Floats | None = None
        self._high: Floats | None = None

    def add(self, audio: Floats) -> None:
        """Take in the next chunk, [1, channels, n], before it is clipped to ±1."""
        finite = np.isfinite(audio)
        if not finite.all():
            bad = int(audio.size - finite.sum())
            self._reject(
                "non-finite",
                f"{bad} of {audio.size} values from sample {self._samples} on are NaN or infinite; the model overflowed"
                " or is damaged. Run `sa3-convert verify` on the bundle.",
            )
        self._samples += audio.shape[-1]
        self._values += audio.size
        self._clipped += int((np.abs(audio) > 1).sum())
        low, high = audio.min(axis=(0, 2)), audio.max(axis=(0, 2))
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)

    def finish(self, samples: int) -> None:
        """Judge the whole, of which `samples` per channel were expected."""
        if self._samples != samples:
            self._reject("duration", f"it has {self._samples} samples per channel, {samples} were asked for.")
        if self._low is None or self._high is None:
            return
        peak = float(np.maximum(np.abs(self._low), np.abs(self._high)).max())
        if peak < SILENCE_PEAK:
            self._reject("silence", f"its peak is {peak:.1e} of full scale.")
        elif float((self._high - self._low).max()) < CONSTANT_SPAN:
            self._reject("constant", f"every channel stays at one value ({float(self._high.max()):+.3f}).")
        share = self._clipped / self._values
        if share > CLIPPING_SHARE:
            self._reject("clipping", f"{share:.0%} of its values lie beyond full scale.")

    def duplicate(self, first: int, second: int) -> None:
        """Report that two seeds of a batch gave the same output."""
        self._reject("duplicate", f"seeds {first} and {second} gave the same audio, so the noise does not matter.")

    def _reject(self, name: CheckName, finding: str) -> None:
        if name not in self._allow:
            raise OutputRejectedError(f"The generated audio failed the check {name!r}: {finding} (waive: {name})")
