"""The probes, by what they are about; `PROBES` lists them all, `GRAPHS` the graphs that they need."""

from sa3_convert.lab.doctor.probe import GraphProbe, Probe
from sa3_convert.lab.doctor.probes.numerics import ARITHMETIC, WEIGHTS
from sa3_convert.lab.doctor.probes.operators import OPERATORS
from sa3_convert.lab.doctor.probes.tools import TOOL_GRAPHS, TOOLS

PROBES: tuple[Probe, ...] = (*OPERATORS, *ARITHMETIC, *WEIGHTS, *TOOLS)
GRAPHS: tuple[GraphProbe, ...] = (*OPERATORS, *ARITHMETIC, *WEIGHTS, *TOOL_GRAPHS)
