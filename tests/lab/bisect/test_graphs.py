"""The reference's pieces compute what the whole does, whatever its operators carry."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper

from sa3_convert.lab.bisect.graphs import ReferenceGraph
from sa3_convert.ort import OrtSession
from tests.lab.bisect.graphs import Net, feeds, network, weights, write


def test_every_tensor_comes_out_of_its_piece_as_out_of_the_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "r.onnx", network, weights())
    graph = ReferenceGraph(path, feeds())
    whole = graph.run(list(graph.tensors), {}, feeds())
    np.testing.assert_allclose(whole["y"], OrtSession(path, threads=1).run(feeds())["y"], atol=1e-5, strict=True)
    for name in graph.tensors:
        given = {source: whole[source] for source in graph.segment(name, graph.tensors)[1]}
        np.testing.assert_array_equal(graph.run([name], given, feeds())[name], whole[name], err_msg=name, strict=True)


def test_a_given_value_is_read_and_what_it_stands_for_computed_in_one_run(tmp_path: Path) -> None:
    graph = ReferenceGraph(write(tmp_path / "r.onnx", network, weights()), feeds())
    ours = np.zeros((1, 9, 32), np.float32)
    found = graph.run(["scaled", "timed"], {"scaled": ours}, feeds())
    time = graph.run(["time"], {}, feeds())["time"]
    assert np.abs(found["scaled"]).max() > 0
    np.testing.assert_array_equal(found["timed"], ours + time)


@pytest.mark.parametrize("extra", [[], [b"\xff"]], ids=["an empty list", "text that is not UTF-8"])
def test_attributes_of_any_kind_are_carried_into_a_piece(tmp_path: Path, extra: list[bytes]) -> None:
    def build(net: Net) -> str:
        name = net("Constant", "nothing")
        empty = helper.make_attribute("value_ints", [], attr_type=AttributeProto.INTS)
        net.nodes[-1].attribute.append(empty)
        net("Reshape", "scalar", "t", name)
        for word in extra:
            net("Constant", "word", value_string=word)
        return net("Mul", "product", "x", "scalar")

    graph = ReferenceGraph(write(tmp_path / "r.onnx", build, weights()), feeds())
    found = graph.run(["product"], {}, feeds())["product"]
    np.testing.assert_array_equal(found, feeds()["x"] * feeds()["t"])


def test_a_value_that_only_a_branch_reads_can_be_given(tmp_path: Path) -> None:
    def branch(operator: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["inner"], ["chosen"])], operator, [], [output])

    def build(net: Net) -> str:
        net("Mul", "inner", "x", "scale")
        return net("If", "branched", "always", then_branch=branch("Neg"), else_branch=branch("Abs"))

    path = write(tmp_path / "r.onnx", build, weights() | {"always": np.array(True)})
    graph, x = ReferenceGraph(path, feeds()), feeds()["x"]
    np.testing.assert_array_equal(graph.run(["branched"], {}, feeds())["branched"], -x * np.float32(0.25))
    np.testing.assert_array_equal(graph.run(["branched"], {"inner": x}, feeds())["branched"], -x)
