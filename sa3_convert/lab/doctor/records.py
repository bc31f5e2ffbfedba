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
    reducesumsquare-axes resize-linear round-half modulo-truncated int64-constant dequantize-after-gather
    dequantize-rows half-external-data gather-negative-level-2 nan-tanh nan-sigmoid nan-exp nan-relu nan-clip nan-max
    fourier-features-half rotary-half fp16-and-bits block-of-24 symmetric-by-default asymmetric-flag bits-of-3d-matmul
    bits-of-table bits-of-shared-weight gelu-exact missing-folder bits-99 scratch-file memory-as-word absent-backend
"""


def _record(wrong: str, unsupported: str) -> Mapping[str, Outcome]:
    outcomes: tuple[tuple[Outcome, str], ...] = (("wrong", wrong), ("unsupported", unsupported))
    return {probe: outcome for outcome, probes in outcomes for probe in probes.split()}


RECORDS: Mapping[tuple[str, str], Mapping[str, Outcome]] = {
    # The wheel from PyPI on x86-64 Linux.
    ("3.6.1", "cpu"): _record(_WRONG, _UNSUPPORTED),
}


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
    """Compare with the record of this version, else with the newest of this backend; None without a record."""
    versions = sorted((v for v, backend in RECORDS if backend == diagnosis.backend), key=version_numbers)
    if not versions:
        return None
    version = diagnosis.mnn if diagnosis.mnn in versions else versions[-1]
    record = RECORDS[version, diagnosis.backend]
    found = diagnosis.defects()
    tried = {result.probe for result in diagnosis.results}
    return Changes(
        version,
        {probe: outcome for probe, outcome in found.items() if record.get(probe) != outcome},
        tuple(probe for probe in record if probe in tried and probe not in found),
    )
