"""The graphs of probes and what is right for them. Both are shipped, so that probing needs no ONNX and no ONNX Runtime.

`graphs.zip` holds, for each probe, its ONNX and what ONNX Runtime's CPU made of it, under a name that hashes all that
the two depend on in the probe. What is not there is made, which needs the extra `check`. After a change of probes, of a
pass that one of them is about, or of the hazard table:

    python -m sa3_convert.lab.doctor.graphs
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from sa3_convert.errors import ConversionError
from sa3_convert.lab.doctor.probe import GraphProbe
from sa3_convert.mnn.isolated import JOB_SECONDS, run_worker
from sa3_convert.system.files import atomic_path
from sa3_convert.system.sealed import fingerprint

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Arrays = Mapping[str, NDArray[Any]]

GRAPH: Final = "probe.onnx"
SHIPPED: Final = Path(__file__).with_name("graphs.zip")
_AVOIDED: Final = "avoided.json"
_LONG_AGO: Final = (1980, 1, 1, 0, 0, 0)
"""So that the same probes give the same bytes."""


def name_of(probe: GraphProbe) -> str:
    """Return what the two files of a probe are called, up to their suffix."""
    return fingerprint(
        text=probe.text,
        opset=probe.opset,
        constants=_digests(probe.constants),
        feeds=[_digests(arrays) for arrays in probe.feeds],
        external_data=probe.external_data,
        rewrite=probe.rewrite,
    )[:16]


def _digests(arrays: Mapping[str, Any]) -> list[tuple[str, str, list[int], str]]:
    """Return names, types, shapes and contents, in order: the order of constants is that of the file."""
    found = ((name, np.ascontiguousarray(value)) for name, value in arrays.items())
    return [(n, str(a.dtype), list(np.shape(arrays[n])), hashlib.sha256(a.tobytes()).hexdigest()) for n, a in found]


def write_graph(probe: GraphProbe, path: Path) -> None:
    """Write what the converter gets."""
    path.write_bytes(_shipped().get(f"{name_of(probe)}.onnx") or graph(probe))
    if probe.external_data:
        path.with_name(f"{path.name}.data").write_bytes(_data(probe))


def reference(probe: GraphProbe) -> list[Arrays]:
    """Return what ONNX Runtime makes of each feed of a probe, by the names of its outputs."""
    stored = _shipped().get(f"{name_of(probe)}.npz")
    with np.load(io.BytesIO(stored or references(probe)), allow_pickle=False) as archive:
        named = [(*name.split("/", 1), archive[name]) for name in archive.files]
    return [{name: array for r, name, array in named if int(r) == run} for run in range(len(probe.feeds))]


def avoided() -> dict[str, str]:
    """Return what this project does about each row of the hazard table."""
    found: dict[str, str] = json.loads(_shipped()[_AVOIDED])
    return found


@cache
def _shipped() -> dict[str, bytes]:
    with zipfile.ZipFile(SHIPPED) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _data(probe: GraphProbe) -> bytes:
    """Return the file beside the graph."""
    return b"".join(content for value in probe.constants.values() if _is_weight(content := np.asarray(value).tobytes()))


def _is_weight(content: bytes) -> bool:
    return len(content) >= 1024


def proto(probe: GraphProbe) -> "onnx.ModelProto":
    """Make a probe's graph as it stands, its constants inside, from its text."""
    from onnx import numpy_helper, parser

    header = f'<ir_version: 10, opset_import: ["" : {probe.opset}, "own" : 1]>\nprobe '
    model = parser.parse_model(header + probe.text)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in probe.constants.items()
    )
    return model


def rewritten(probe: GraphProbe) -> "ir.Model":
    """Make a probe's graph and apply the pass that it is about."""
    import onnx_ir as ir

    from sa3_convert.passes.fp16_safe import make_fp16_safe
    from sa3_convert.passes.quantise_embedding import quantise_embedding

    model = ir.serde.deserialize_model(proto(probe))
    match probe.rewrite:
        case "fp16-safe":
            make_fp16_safe(model)
        case "int8-table":
            quantise_embedding(model, "int8")
        case "int4-table":
            quantise_embedding(model, "int4")
    return model


def graph(probe: GraphProbe) -> bytes:
    """Make the ONNX of a probe."""
    import onnx_ir as ir
    from onnx.external_data_helper import set_external_data

    model = ir.serde.serialize_model(rewritten(probe)) if probe.rewrite else proto(probe)
    if probe.external_data:
        start = 0
        for tensor in filter(lambda tensor: _is_weight(tensor.raw_data), model.graph.initializer):
            set_external_data(tensor, f"{GRAPH}.data", start, len(tensor.raw_data))
            start += len(tensor.raw_data)
            tensor.ClearField("raw_data")
    return bytes(model.SerializeToString(deterministic=True))


def references(probe: GraphProbe) -> bytes:
    """Run a probe's graph, as it was before any rewriting, in ONNX Runtime; returns a file of NumPy arrays."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(proto(probe).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    file = io.BytesIO()
    runs = (zip(names, session.run(names, dict(feeds)), strict=True) for feeds in probe.feeds)
    np.savez(file, **{f"{run}/{name}": array for run, outputs in enumerate(runs) for name, array in outputs})
    return file.getvalue()


def ship(probes: Iterable[GraphProbe], path: Path = SHIPPED) -> None:
    """Write graphs and references of probes, and what the hazard table says, into one file."""
    from sa3_convert.passes.hazards import HAZARD_KINDS

    files = {_AVOIDED: json.dumps({kind.id: kind.avoided for kind in HAZARD_KINDS}).encode()}
    for probe in probes:
        files[f"{name_of(probe)}.onnx"] = graph(probe)
        if probe.feeds:
            files[f"{name_of(probe)}.npz"] = references(probe)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, _LONG_AGO), content, zipfile.ZIP_DEFLATED, 9)


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
    source = folder / GRAPH
    write_graph(probe, source)
    arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "sa3", *flags]
    return run_worker(["convert", *arguments], folder, timeout=JOB_SECONDS)


def _complaint(output: str) -> str:
    """Return the line in which the converter says why, or its last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "not support" in line.lower() or "error" in line.lower()]
    return re.sub(r"^\[[\d:]+\] \S*: ", "", (telling or lines or ["it printed nothing"])[-1])


if __name__ == "__main__":
    from sa3_convert.lab.doctor.probes import GRAPHS

    ship(GRAPHS)
