"""A probe: a small graph or a call of the converter, and what a sound MNN would make of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from sa3_convert.components import Component
from sa3_convert.lab.doctor.results import setting_name

Level = Literal["normal", "high", "low"]
Feeds = Mapping[str, NDArray[Any]]
LEVELS: tuple[Level, ...] = ("high", "normal", "low")

EXACT_DB = 78.0
"""What float32 operators reach with room to spare: x86-64 has 110 dB and more, aarch64, whose exp and tanh are coarser,
82 of attention. One rounding to half leaves 75 to 77 at best."""
HALF_DB = 40.0
"""What operators reach in half arithmetic with room to spare: 50 dB and more, with sums that are halves too."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How the runtime is asked to compute."""

    precision: Level = "high"
    memory: Level = "normal"

    @property
    def name(self) -> str:
        """How results call it."""
        return setting_name(self.precision, self.memory)


PRECISIONS = tuple(Setting(precision) for precision in LEVELS)
EVERY_SETTING = tuple(Setting(precision, memory) for precision in LEVELS for memory in LEVELS)


@dataclass(frozen=True, kw_only=True)
class GraphProbe:
    """A graph that MNN converts and runs, and ONNX Runtime runs too."""

    id: str
    asks: str
    """What is tried, in a few words."""
    text: str
    """ONNX's textual form, from the inputs on."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    feeds: tuple[Feeds, ...] = ({},)
    """Run one after the other in one session; their lengths may differ."""
    hazard: str | None = None
    """Row of the hazard table that a bad answer shows."""
    needed_by: tuple[Component, ...] = ()
    """Components whose graphs are spelled like this."""
    opset: int = 18
    flags: tuple[str, ...] = ()
    """Further flags of the converter."""
    settings: tuple[Setting, ...] = (Setting(),)
    least_db: float = EXACT_DB
    """What the way of storing allows, less than exact where weights are integers."""
    half_db: float = HALF_DB
    """What half arithmetic allows."""
    ahead: bool = False
    """Whether a split DiT has it in the parts that run ahead, which do not compute with halves."""
    processes: int = 1
    """More where the same file is wrong in some processes only: as many are tried until one is."""
    external_data: bool = False
    """Keep the weights in a file beside the graph."""
    rewrite: Literal["", "fp16-safe", "int8-table", "int4-table"] = ""
    """A pass of this project, where the probe is about what it makes; ONNX Runtime runs the graph without it."""


@dataclass(frozen=True, kw_only=True)
class ToolProbe:
    """Something that MNN's converter or its Python bindings are asked to do, judged by what comes of it."""

    id: str
    asks: str
    hazard: str
    check: Callable[[Path], str | None]
    """Gets an empty folder; returns what is wrong, or None. Errors that it raises mean that MNN refused."""


Probe = GraphProbe | ToolProbe
