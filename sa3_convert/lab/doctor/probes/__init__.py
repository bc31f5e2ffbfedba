"""The probes, by what they are about; `PROBES` lists them all."""

from sa3_convert.lab.doctor.probe import Probe
from sa3_convert.lab.doctor.probes.numerics import ARITHMETIC, WEIGHTS
from sa3_convert.lab.doctor.probes.operators import OPERATORS
from sa3_convert.lab.doctor.probes.tools import TOOLS
from sa3_convert.passes.operator_kinds import OPERATOR_KINDS

PROBES: tuple[Probe, ...] = (*OPERATORS, *ARITHMETIC, *WEIGHTS, *TOOLS)

UNPROBED = {
    "unfused-weight-norm": "right as it stands; the reductions are probed",
    "split-weights-half": "needs more than 2000 MB of weights",
    "weights-unpacked": "is about a GPU's memory, not about numbers",
    "shape-range": "is about older versions than this project installs; `mnn.readers` sees it in a file",
    "silu-unknown": "the same",
    "half-scales-unread": "the same",
    **{kind.id: "kept with the results of ONNX's node tests; no graph of ours has it" for kind in OPERATOR_KINDS},
}
"""Rows of the hazard table without a probe, and why."""
