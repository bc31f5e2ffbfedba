"""A probe: a small graph or a call of the converter, and what a sound MNN would make of it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from sa3_convert.components import Component
from sa3_convert.errors import ConversionError
from sa3_convert.lab.doctor.results import setting_name
from sa3_convert.mnn.isolated import JOB_SECONDS, run_worker

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
    """Keep the initialisers in a file beside the graph."""
    rewrite: Callable[[ir.Model], object] | None = None
    """A pass of this project, where the probe is about what it makes; ONNX Runtime runs the graph without it."""

    def proto(self) -> onnx.ModelProto:
        """Return the graph as it stands."""
        header = f'<ir_version: 10, opset_import: ["" : {self.opset}, "own" : 1]>\nprobe '
        proto = parser.parse_model(header + self.text)
        proto.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), name) for name, value in self.constants.items()
        )
        return proto

    def write(self, path: Path) -> None:
        """Write what the converter gets."""
        proto = self.proto()
        if self.rewrite is not None:
            model = ir.serde.deserialize_model(proto)
            self.rewrite(model)
            proto = ir.serde.serialize_model(model)
        onnx.save(
            proto,
            path,
            format="protobuf",
            save_as_external_data=self.external_data,
            location=f"{path.name}.data",
            size_threshold=0,
        )


@dataclass(frozen=True, kw_only=True)
class ToolProbe:
    """Something that MNN's converter or its Python bindings are asked to do, judged by what comes of it."""

    id: str
    asks: str
    hazard: str
    check: Callable[[Path], str | None]
    """Gets an empty folder; returns what is wrong, or None. Errors that it raises mean that MNN refused."""


Probe = GraphProbe | ToolProbe

_AS_CONVERTED_HERE = {"--optimizeLevel": "1", "--useGeluApproximation": "0"}


def converted(probe: GraphProbe, folder: Path, flags: Sequence[str] = (), *, plain: bool = False) -> Path:
    """Convert a probe's graph into an empty folder; `plain` is without the flags that every conversion has."""
    target = folder / "probe.mnn"
    given = [] if plain else [word for f in _AS_CONVERTED_HERE.items() if f[0] not in flags for word in f]
    output = converter_output(probe, target, folder, [*flags, *given])
    if not target.is_file() or not target.stat().st_size:
        raise ConversionError(f"no file: {_complaint(output)}")
    return target


def converter_output(probe: GraphProbe, target: Path, folder: Path, flags: Sequence[str]) -> str:
    """Ask the converter for `target`, with no pass and no judge of ours between, and return what it said."""
    source = folder / "probe.onnx"
    probe.write(source)
    arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "sa3", *flags]
    return run_worker(["convert", *arguments], folder, timeout=JOB_SECONDS)


def _complaint(output: str) -> str:
    """Return the line in which the converter says why, or its last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "not support" in line.lower() or "error" in line.lower()]
    return re.sub(r"^\[[\d:]+\] \S*: ", "", (telling or lines or ["it printed nothing"])[-1])
