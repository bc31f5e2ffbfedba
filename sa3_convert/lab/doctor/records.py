"""What each version of MNN was found to do, so that another version, or another build, shows what changed.

A record lists the probes that do not just work; every other probe worked. It is replaced by what `doctor --json` says
once somebody has looked at the change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sa3_convert.lab.doctor.results import Diagnosis, Outcome
from sa3_convert.mnn.compatibility import version_numbers

_UNSUPPORTED: Final = """
    isnan-operator isinf-operator mish-operator groupnormalization-operator rmsnormalization-operator
    attention-operator rotaryembedding-operator local-function
"""
_WRONG: Final = """
    where-broadcast-row where-broadcast-column reducel1-axes reducel2-axes reducelogsum-axes reducelogsumexp-axes
    reducesumsquare-axes round-half modulo-truncated int64-constant dequantize-rows half-external-data
    gather-negative-level-2 fourier-features-half rotary-half fp16-and-bits block-of-24 symmetric-by-default
    asymmetric-flag bits-of-3d-matmul bits-of-table bits-of-shared-weight gelu-exact missing-folder bits-99 scratch-file
    memory-as-word absent-backend
"""
_ON_X86: Final = " resize-linear dequantize-after-gather nan-tanh nan-sigmoid nan-exp nan-relu nan-clip nan-max"
_ON_ARM: Final = " fourier-features gated-product"
"""At precision low: phases, and range, that halves do not have."""


def _record(wrong: str, unsupported: str) -> Mapping[str, Outcome]:
    outcomes: tuple[tuple[Outcome, str], ...] = (("wrong", wrong), ("unsupported", unsupported))
    return {probe: outcome for outcome, probes in outcomes for probe in probes.split()}


RECORDS: Mapping[tuple[str, str, str], Mapping[str, Outcome]] = {
    # The wheels from PyPI for Linux.
    ("3.6.1", "cpu", "x86_64"): _record(_WRONG + _ON_X86, _UNSUPPORTED),
    # An emulated cortex-a76 ran what was converted on x86-64; what is said of the converter is as there.
    ("3.6.1", "cpu", "aarch64"): _record(_WRONG + _ON_ARM, _UNSUPPORTED),
}
"""By version of MNN, backend, and kind of processor."""


_SPORADIC: Final = frozenset({"resize-linear"})
"""What some processes show and others do not, in some environments none at all: not to have seen it proves nothing."""


@dataclass(frozen=True, slots=True)
class Changes:
    """How a diagnosis differs from a record."""

    version: str
    """Of MNN, of the record."""
    appeared: Mapping[str, Outcome]
    """What is not right and was, or was so in another way."""
    gone: tuple[str, ...]
    """What was not right and is now."""

    def __bool__(self) -> bool:
        return bool(self.appeared or self.gone)

    def describe(self) -> str:
        """Return what changed, in a sentence."""
        parts = []
        if self.appeared:
            parts.append("new: " + ", ".join(f"{probe} {outcome}" for probe, outcome in self.appeared.items()))
        if self.gone:
            parts.append("right now: " + ", ".join(self.gone))
        what = "; ".join(parts) or "nothing"
        return f"Against what is recorded for MNN {self.version}: {what}."


def changes(diagnosis: Diagnosis) -> Changes | None:
    """Compare with the record of this version, else with the newest of this backend and kind of processor, if any."""
    where = (diagnosis.backend, diagnosis.architecture)
    versions = sorted((version for version, *place in RECORDS if tuple(place) == where), key=version_numbers)
    if not versions:
        return None
    version = diagnosis.mnn if diagnosis.mnn in versions else versions[-1]
    record = RECORDS[version, diagnosis.backend, diagnosis.architecture]
    found = diagnosis.defects()
    tried = {result.probe for result in diagnosis.results}
    return Changes(
        version,
        {probe: outcome for probe, outcome in found.items() if record.get(probe) != outcome},
        tuple(probe for probe in record if probe in tried - _SPORADIC and probe not in found),
    )
