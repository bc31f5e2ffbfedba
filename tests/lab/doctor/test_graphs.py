"""What is shipped for probing: that it is what the probes say, and that it is enough."""

import io
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from sa3_convert.lab.doctor import graphs
from sa3_convert.lab.doctor.graphs import avoided, graph, name_of, reference, references, ship, write_graph
from sa3_convert.lab.doctor.probe import GraphProbe
from sa3_convert.lab.doctor.probes import GRAPHS
from sa3_convert.passes.hazards import HAZARD_KINDS

X = np.linspace(-2, 2, 24, dtype=np.float32).reshape(4, 6)
PROBE = GraphProbe(
    id="sum",
    asks="a sum",
    text="(float[4, 6] x) => (float[4, 6] y) { y = Add(x, c) }",
    constants={"c": X},
    feeds=({"x": X},),
)
TABLE = next(probe for probe in GRAPHS if probe.id == "table-int8")
AGAIN = "`python -m sa3_convert.lab.doctor.graphs` ships what stands there now."


@pytest.fixture(scope="module")
def shipped() -> dict[str, bytes]:
    with zipfile.ZipFile(graphs.SHIPPED) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_every_graph_is_shipped_as_the_probe_says(shipped: dict[str, bytes]) -> None:
    for probe in GRAPHS:
        assert shipped.get(f"{name_of(probe)}.onnx") == graph(probe), f"{probe.id}. {AGAIN}"


def test_every_reference_is_what_onnx_runtime_makes(shipped: dict[str, bytes]) -> None:
    for probe in GRAPHS:
        if probe.feeds:
            stored = np.load(io.BytesIO(shipped[f"{name_of(probe)}.npz"]))
            made = np.load(io.BytesIO(references(probe)))
            assert stored.files == made.files
            for name in made.files:
                # Another processor adds in another order.
                np.testing.assert_allclose(stored[name], made[name], rtol=1e-4, atol=1e-4, err_msg=probe.id)


def test_nothing_else_is_shipped(shipped: dict[str, bytes]) -> None:
    names = {name_of(probe) for probe in GRAPHS}
    assert {name.partition(".")[0] for name in shipped} == names | {"avoided"}, AGAIN
    assert sum(map(len, shipped.values())) < 1_000_000


def test_what_is_done_about_hazards_is_what_the_table_says() -> None:
    assert avoided() == {kind.id: kind.avoided for kind in HAZARD_KINDS}, AGAIN


@pytest.mark.parametrize(
    "other",
    [
        replace(TABLE, text=TABLE.text.replace("y", "z")),
        replace(TABLE, opset=19),
        replace(TABLE, constants={name: 2 * value for name, value in TABLE.constants.items()}),
        replace(TABLE, feeds=()),
        replace(TABLE, rewrite=""),
        replace(TABLE, external_data=True),
    ],
    ids=["text", "opset", "constants", "feeds", "rewrite", "external-data"],
)
def test_a_probe_that_was_changed_is_another_one(other: GraphProbe) -> None:
    assert name_of(other) not in {name_of(probe) for probe in GRAPHS}


def test_what_is_not_shipped_is_made(tmp_path: Path) -> None:
    write_graph(PROBE, tmp_path / "probe.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "probe.onnx").graph.node] == ["Add"]
    np.testing.assert_array_equal(reference(PROBE)[0]["y"], 2 * X)


def test_weights_beside_a_graph_are_those_of_the_probe(tmp_path: Path) -> None:
    weights = np.arange(24 * 16, dtype=np.float32).reshape(24, 16)
    probe = replace(PROBE, constants={"small": X, "c": weights, "last": weights + 1}, external_data=True)
    write_graph(probe, tmp_path / "probe.onnx")
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "probe.onnx").graph.initializer}
    assert (tmp_path / "probe.onnx.data").stat().st_size == 2 * weights.nbytes
    for name, value in probe.constants.items():
        np.testing.assert_array_equal(held[name], value)


def test_the_same_probes_make_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        ship((PROBE, TABLE), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_probing_needs_what_running_needs() -> None:
    program = """
import sys
for name in ("onnx", "onnxruntime", "onnx_ir", "onnx_graphsurgeon", "torch"):
    sys.modules[name] = None
from sa3_convert.lab.doctor.examine import examine, surroundings
from sa3_convert.lab.doctor.probes import PROBES
wanted = ("reducel2-axes", "table-int8", "linear-int8", "half-external-data", "bits-of-table")
found = examine("cpu", [probe for probe in PROBES if probe.id in wanted])
print({result.probe: result.worst.outcome for result in found}, surroundings()["onnxruntime_providers"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for said in ("'linear-int8': 'works'", "'table-int8': 'works'", "'reducel2-axes': 'wrong'", "} None"):
        assert said in done.stdout
