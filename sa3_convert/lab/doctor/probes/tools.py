"""What MNN's converter and its Python bindings do with what they are asked."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sa3_convert.lab.doctor.bindings import check_apart
from sa3_convert.lab.doctor.graphs import converted, converter_output
from sa3_convert.lab.doctor.probe import GraphProbe, ToolProbe
from sa3_convert.mnn.file.contents import ModelStorage
from sa3_convert.mnn.file.storage import read_storage

_RANDOM = np.random.default_rng(3)
_W = _RANDOM.standard_normal((48, 32)).astype(np.float32)


def _graph(text: str, **constants: Any) -> GraphProbe:
    return GraphProbe(id="", asks="", text=text, constants=constants, feeds=())


_LINEAR = _graph("(float[1, 48] x) => (float[1, 32] y) { y = MatMul(x, w) }", w=_W)
_THREE = _graph("(float[2, 1, 48] x) => (float[2, 1, 32] y) { y = MatMul(x, w) }", w=np.stack([_W, -_W]))
_TABLE = _graph("(int32[4] i) => (float[4, 32] y) { y = Gather(w, i) }", w=_W)
_SHARED = _graph(
    "(float[1, 32] x) => (float[1, 32] y) { a = MatMul(x, w)  b = MatMul(a, w)  c = MatMul(b, w)  d = MatMul(c, w)"
    "  y = MatMul(d, w) }",
    w=_W[:32],
)
_GELU = _graph(
    "(float[1, 64] x) => (float[1, 64] y) { a = Div(x, r)  b = Erf(a)  c = Add(b, one)  d = Mul(x, c)  y = Mul(d, h) }",
    r=np.float32(2**0.5),
    one=np.float32(1),
    h=np.float32(0.5),
)
TOOL_GRAPHS: tuple[GraphProbe, ...] = (_LINEAR, _THREE, _TABLE, _SHARED, _GELU)


def _holds(graph: GraphProbe, flags: Sequence[str], wrong: Callable[[ModelStorage], str | None]) -> Any:
    """Return a check that converts and looks at what the file holds."""

    def check(folder: Path) -> str | None:
        return wrong(read_storage(converted(graph, folder, flags)))

    return check


def _types(storage: ModelStorage) -> set[str]:
    return {weight.type for _, weight in storage.weighted()}


def _not_eight_bits(storage: ModelStorage) -> str | None:
    found = _types(storage) | {c.type for c in storage.constants if c.is_float and c.elements > 64}
    return None if found == {"int8"} else f"stored as {', '.join(sorted(found))}"


def _one_per_channel(storage: ModelStorage) -> str | None:
    blocks = {weight.block_size for _, weight in storage.weighted()}
    return "one scale per channel" if blocks == {None} else None


def _asymmetric(storage: ModelStorage) -> str | None:
    return None if all(weight.symmetric for _, weight in storage.weighted()) else "asymmetric"


def _symmetric(storage: ModelStorage) -> str | None:
    return "symmetric" if all(weight.symmetric for _, weight in storage.weighted()) else None


def _claims_success(*flags: str, target: str = "probe.mnn") -> Callable[[Path], str | None]:
    """Return a check that asks for the impossible and expects no success."""

    def check(folder: Path) -> str | None:
        said = converter_output(_LINEAR, folder / target, folder, flags)
        return "“Converted Success!”" if "Converted Success!" in said else None

    return check


def _exact_gelu(folder: Path) -> str | None:
    storage = read_storage(converted(_GELU, folder, plain=True))
    return "the tanh form" if "gelu" in {operator.function for operator in storage.operators} else None


def _calls(name: str) -> Callable[[Path], str | None]:
    """Return a check of the bindings."""

    def check(folder: Path) -> str | None:
        model = converted(_LINEAR, folder, ("--weightQuantBits", "8"))
        return check_apart(name, model, folder)

    return check


TOOLS: tuple[ToolProbe, ...] = (
    ToolProbe(
        id="fp16-and-bits",
        asks="--weightQuantBits 8 and --fp16 in one call",
        hazard="fp16-cancels-bits",
        check=_holds(_LINEAR, ("--weightQuantBits", "8", "--fp16"), _not_eight_bits),
    ),
    ToolProbe(
        id="block-of-24",
        asks="--weightQuantBlock 24, which divides the inputs but is no multiple of 16",
        hazard="block-size-ignored",
        check=_holds(_LINEAR, ("--weightQuantBits", "8", "--weightQuantBlock", "24"), _one_per_channel),
    ),
    ToolProbe(
        id="symmetric-by-default",
        asks="symmetric weights when no flag asks for others, as the help says",
        hazard="symmetry-flag",
        check=_holds(_LINEAR, ("--weightQuantBits", "8"), _asymmetric),
    ),
    ToolProbe(
        id="asymmetric-flag",
        asks="asymmetric weights by the bare flag --weightQuantAsymmetric",
        hazard="symmetry-flag",
        check=_holds(_LINEAR, ("--weightQuantBits", "8", "--weightQuantAsymmetric"), _symmetric),
    ),
    ToolProbe(
        id="bits-of-3d-matmul",
        asks="8 bits for a MatMul with a three-dimensional constant",
        hazard="weights-left-float",
        check=_holds(_THREE, ("--weightQuantBits", "8"), _not_eight_bits),
    ),
    ToolProbe(
        id="bits-of-table",
        asks="8 bits for the table of a Gather",
        hazard="weights-left-float",
        check=_holds(_TABLE, ("--weightQuantBits", "8"), _not_eight_bits),
    ),
    ToolProbe(
        id="bits-of-shared-weight",
        asks="8 bits for a weight that five MatMuls share",
        hazard="weights-left-float",
        check=_holds(_SHARED, ("--weightQuantBits", "8"), _not_eight_bits),
    ),
    ToolProbe(
        id="gelu-exact",
        asks="exact GELU stays exact without a flag",
        hazard="gelu-approximated",
        check=_exact_gelu,
    ),
    ToolProbe(
        id="missing-folder",
        asks="a failure when the output's folder does not exist",
        hazard="success-claimed",
        check=_claims_success(target="absent/probe.mnn"),
    ),
    ToolProbe(
        id="bits-99",
        asks="a failure with 99 bits",
        hazard="success-claimed",
        check=_claims_success("--weightQuantBits", "99"),
    ),
    ToolProbe(
        id="scratch-file",
        asks="no file of a fixed name in the working directory while converting",
        hazard="shared-scratch",
        check=_calls("scratch"),
    ),
    ToolProbe(
        id="memory-as-word",
        asks='{"memory": "low"} keeps weights quantised',
        hazard="words-ignored",
        check=_calls("words"),
    ),
    ToolProbe(
        id="absent-backend",
        asks="an error for a backend that is not there",
        hazard="backend-replaced",
        check=_calls("replaced"),
    ),
)
