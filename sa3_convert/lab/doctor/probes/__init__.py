"""The probes, by what they are about; `PROBES` lists them all."""

from sa3_convert.lab.doctor.probe import Probe
from sa3_convert.lab.doctor.probes.numerics import ARITHMETIC, WEIGHTS
from sa3_convert.lab.doctor.probes.operators import OPERATORS
from sa3_convert.lab.doctor.probes.tools import TOOLS

PROBES: tuple[Probe, ...] = (*OPERATORS, *ARITHMETIC, *WEIGHTS, *TOOLS)
