"""Names come from parameters and modules, and never from counters that a change elsewhere would shift."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from sa3_convert.components import Contract, Length, Port
from sa3_convert.export.component import onnx_from_module


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.gamma


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.to_qkv = nn.Linear(8, 24, bias=False)
        self.to_out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        result: Tensor = x + self.to_out(torch.softmax(q @ k.transpose(1, 2), -1) @ v)
        return result


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.time = nn.Linear(1, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.tied = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = x.transpose(1, 2) + self.time(t)
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.tied(torch.tanh(self.tied(tokens)))
        result: Tensor = self.conv(tokens.transpose(1, 2))
        return result


T = Length()
CONTRACT = Contract(
    (Port("x", "float32", (1, 8, T)), Port("t", "float32", (1, 1))), (Port("out", "float32", (1, 8, T)),)
)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ir.Graph:
    path: Path = tmp_path_factory.mktemp("names") / "net.onnx"
    onnx_from_module(Network().eval().requires_grad_(False), CONTRACT, path)
    return ir.load(path).graph


def test_linears_are_called_after_their_parameter(graph: ir.Graph) -> None:
    linears = [n for n in graph if n.op_type in ("MatMul", "Gemm") and n.inputs[1].is_initializer()]
    assert [node.name for node in linears] == [
        "time",
        *(f"layers.{index}.{name}" for index in (0, 1) for name in ("to_qkv", "to_out")),
        "tied",
        "tied_2",
    ]
    assert all(node.outputs[0].name == node.name for node in linears)


def test_the_graph_carries_the_file_name(graph: ir.Graph) -> None:
    assert graph.name == "net"


def test_other_operators_are_called_after_their_module(graph: ir.Graph) -> None:
    names = [node.name for node in graph]
    for expected in (
        "layers.1.norm.reducemean",
        "layers.1.norm.mul",
        "layers.1.norm.mul_2",
        "layers.1.to_out.add",
        "layers.1.softmax",
        "layers.1.split",
        "tanh",
    ):
        assert expected in names


def test_the_outputs_of_a_split_are_numbered(graph: ir.Graph) -> None:
    split = next(node for node in graph if node.name == "layers.0.split")
    assert [value.name for value in split.outputs] == ["layers.0.split", "layers.0.split.1", "layers.0.split.2"]


def test_inputs_outputs_and_parameters_keep_their_names(graph: ir.Graph) -> None:
    assert [value.name for value in graph.inputs] == ["x", "t"]
    assert [value.name for value in graph.outputs] == ["out"]
    assert {name for name, _ in Network().named_parameters()} <= set(graph.initializers)


def test_the_operator_that_gives_an_output_is_named_though_its_value_is_the_output(graph: ir.Graph) -> None:
    conv = graph[-1]
    assert (conv.op_type, conv.name, conv.outputs[0].name) == ("Conv", "conv", "out")


def test_constants_without_a_name_of_their_own_are_numbered(graph: ir.Graph) -> None:
    parameters = {name for name, _ in Network().named_parameters()}
    others = [name for name in graph.initializers if name not in parameters]
    assert sorted(others) == sorted(["constant", *(f"constant_{n}" for n in range(2, len(others) + 1))])


def test_no_two_things_share_a_name(graph: ir.Graph) -> None:
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    assert len({value.name for value in values}) == len(values)
    assert len({node.name for node in graph}) == len(list(graph))
