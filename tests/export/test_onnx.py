"""The exporter on small networks of every awkward kind: lengths, failures, what is left on disk, sameness of bytes."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from sa3_convert.components import Contract, Length, Port
from sa3_convert.errors import ConversionError
from sa3_convert.export import component as export_room
from sa3_convert.export.component import check_onnx, onnx_from_module
from sa3_convert.ort import OrtSession


class Block(nn.Module):
    """[1, 8, T] → [1, 4, T]: linear with bias, positions, a conv, a view over the length."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.out = nn.Linear(32, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.project(x.transpose(1, 2))
        positions = torch.arange(tokens.shape[1], dtype=torch.float32)[:, None] * 0.01
        heads = (tokens + positions).view(1, -1, 2, 16).transpose(1, 2)
        mixed = (torch.softmax(heads @ heads.transpose(-1, -2), -1) @ heads).transpose(1, 2).flatten(2)
        result: Tensor = self.out(self.conv(mixed.transpose(1, 2)).transpose(1, 2)).transpose(1, 2)
        return result


class Pairs(nn.Module):
    """[1, 4, 16·T] → [1, 4, 16·T] with the mean of each window of two latents removed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        windows = x.view(1, 4, -1, 32)
        result: Tensor = (windows - windows.mean(-1, keepdim=True)).view(1, 4, -1) * self.scale
        return result


class LongOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[-1] >= 8 else x * 3


class FixedLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


T = Length()
BLOCK = Contract((Port("x", "float32", (1, 8, T)),), (Port("y", "float32", (1, 4, T)),))
PAIRS = Contract((Port("x", "float32", (1, 4, Length(16))),), (Port("y", "float32", (1, 4, Length(16))),))
SAME = Contract((Port("x", "float32", (1, 4, T)),), (Port("y", "float32", (1, 4, T)),))


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def exported_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tests copy or only read."""
    path = tmp_path_factory.mktemp("block") / "m.onnx"
    onnx_from_module(seeded(Block()), BLOCK, path)
    return path


@pytest.fixture
def block(exported_block: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported_block.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "m.onnx"


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def assert_same_at(module: nn.Module, path: Path, shapes: list[tuple[int, ...]]) -> None:
    session = OrtSession(path, threads=1)
    for shape in shapes:
        x = noise(*shape)
        expected = module(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(session.run({"x": x})["y"], expected, rtol=1e-4, atol=1e-5, strict=True)


def test_one_length_is_traced_and_every_length_is_right(block: Path) -> None:
    assert_same_at(seeded(Block()), block, [(1, 8, n) for n in (1, 2, 3, 7, 12, 13, 100)])


def test_windows_of_several_latents_work_at_every_multiple(tmp_path: Path) -> None:
    module = seeded(Pairs())
    onnx_from_module(module, PAIRS, tmp_path / "m.onnx", multiple=2)
    assert_same_at(module, tmp_path / "m.onnx", [(1, 4, 32 * n) for n in (1, 2, 3, 8, 20)])


def test_no_trace_of_the_unit_stays_in_the_graph(tmp_path: Path) -> None:
    onnx_from_module(seeded(Pairs()), PAIRS, tmp_path / "m.onnx", multiple=2)
    graph = ir.load(tmp_path / "m.onnx").graph
    assert [node.op_type for node in graph] == ["Reshape", "ReduceMean", "Sub", "Reshape", "Mul"]
    assert [str(dim) for dim in graph[0].outputs[0].shape or ()] == ["1", "4", "T/2", "32"]


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    module = seeded(Pairs())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    onnx_from_module(module, PAIRS, tmp_path / "m.onnx", multiple=2)
    assert module(torch.ones(1, 4, 64)).shape == (1, 4, 64)
    assert not module._forward_pre_hooks
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(("module", "ports"), [(LongOnly(), SAME), (FixedLength(), SAME)])
def test_a_network_that_holds_for_some_lengths_only_is_refused(
    module: nn.Module, ports: Contract, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError):
        onnx_from_module(module.eval().requires_grad_(False), ports, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_windows_without_their_multiple_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError):
        onnx_from_module(seeded(Pairs()), PAIRS, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (Port("y", "float32", (1, 5, T)), "5"),
        (Port("y", "float32", (1, 4, Length(2))), "2"),
        (Port("y", "int32", (1, 4, T)), "INT32"),
    ],
)
def test_an_output_that_is_not_the_contracts_is_refused(output: Port, found: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=found):
        onnx_from_module(seeded(Block()), Contract(BLOCK.inputs, (output,)), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_large_tensors_lie_beside_the_graph_and_small_ones_in_it(block: Path) -> None:
    module = Block()
    for value in ir.load(block).graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        assert isinstance(tensor, ir.ExternalTensor) == (tensor.nbytes >= export_room.INLINE_BELOW), value.name
    weights = [module.project.weight, module.conv.weight, module.out.weight]
    assert Path(f"{block}.data").stat().st_size == sum(4 * weight.numel() for weight in weights)


def test_a_network_without_large_tensors_leaves_no_data_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx.data").write_bytes(b"of an earlier model")
    onnx_from_module(seeded(Pairs()), PAIRS, tmp_path / "m.onnx", multiple=2)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


EXPORT_AND_HASH = """
import sys
from pathlib import Path
from tests.export.test_onnx import BLOCK, Block, digest, onnx_from_module, seeded
onnx_from_module(seeded(Block()), BLOCK, Path(sys.argv[1]))
print(digest(Path(sys.argv[1])))
"""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes() + Path(f"{path}.data").read_bytes()).hexdigest()


def test_the_same_weights_give_the_same_bytes_in_another_process_and_folder(block: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    again = subprocess.run(
        [sys.executable, "-c", EXPORT_AND_HASH, str(tmp_path / "other" / "m.onnx")],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.strip() == digest(block)
    assert again.stderr == ""


def test_nothing_of_the_machine_is_in_the_file(block: Path) -> None:
    content = block.read_bytes()
    for trace in (str(Path.cwd()), "/tmp", "test_onnx", ".py", "pkg.torch", "stack_trace"):
        assert trace.encode() not in content


def test_a_failed_check_leaves_what_was_there_before(block: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(block)

    def refuse(*_: object) -> None:
        raise ConversionError("refused")

    monkeypatch.setattr(export_room, "check_onnx", refuse)
    with pytest.raises(ConversionError, match="refused"):
        onnx_from_module(seeded(Block()), BLOCK, block)
    assert digest(block) == before
    assert sorted(file.name for file in block.parent.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: ir.Model, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(OSError, match="No space left"):
        onnx_from_module(seeded(Block()), BLOCK, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_export_over_an_earlier_one_replaces_both_files(block: Path) -> None:
    other = seeded(Block())
    other.project.weight.mul_(2)
    onnx_from_module(other, BLOCK, block)
    assert_same_at(other, block, [(1, 8, 5)])


def test_the_exporter_says_nothing_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnx_from_module(seeded(Block()), BLOCK, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")


def test_the_check_refuses_a_file_with_another_contract(block: Path) -> None:
    renamed = Contract((Port("z", "float32", (1, 8, T)),), BLOCK.outputs)
    with pytest.raises(ConversionError, match=r"inputs \[\('x', .*the contract says \[\('z'"):
        check_onnx(block, renamed)


def test_the_check_refuses_an_invalid_graph(block: Path) -> None:
    model = ir.load(block)
    model.graph[0].op_type = "Frobnicate"
    ir.save(model, block)
    with pytest.raises(ConversionError, match="not valid ONNX"):
        check_onnx(block, BLOCK)


def test_no_thread_watches_over_a_progress_bar_that_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python waits for ever for a thread that there is no memory for."""
    monkeypatch.setattr("tqdm.std.tqdm.monitor", None)
    started: list[object] = []
    monkeypatch.setattr("tqdm.std.TMonitor.start", lambda monitor: started.append(monitor))
    onnx_from_module(Block(), BLOCK, tmp_path / "block.onnx")
    assert started == []
