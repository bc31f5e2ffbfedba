"""`inspect` shows what matters of a file, on narrow terminals too, and nothing of it is taken for markup."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from sa3_convert.cli.console import EscapingConsole
from sa3_convert.cli.inspection_tables import render_storage as render
from sa3_convert.mnn.file.contents import ModelStorage
from sa3_convert.mnn.file.storage import read_storage
from tests.mnn.converted import Converter


def shown(storage: ModelStorage, width: int = 120) -> str:
    console = EscapingConsole(file=StringIO(), width=width)
    console.print(render(storage))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.fixture
def storage(converter: Converter, mixed: Path) -> ModelStorage:
    return read_storage(converter(mixed, "--weightQuantBits", "4", "--weightQuantBlock", "16"))


def row(text: str, start: str) -> str:
    return next(" ".join(line.split()) for line in text.splitlines() if line.split()[:1] == [start])


def test_each_layer_is_a_row_with_its_scheme_and_bytes(storage: ModelStorage) -> None:
    assert row(shown(storage), "first") == "first 128×64 int4 asym 16 inputs 4.0 KiB 4.0 KiB fp32"


def test_a_kernel_is_part_of_the_shape(storage: ModelStorage) -> None:
    assert row(shown(storage), "conv").startswith("conv 32×96×3×1 ")


def test_float_layers_have_no_scheme(converter: Converter, mixed: Path) -> None:
    assert row(shown(read_storage(converter(mixed, "--fp16"))), "second") == "second 96×128 fp16 24.0 KiB"


def test_large_constants_are_rows_and_small_ones_a_sum(storage: ModelStorage) -> None:
    text = shown(storage)
    assert row(text, "table") == "table fp32 300×64 75.0 KiB"
    assert "smaller ones" in text


def test_ports_show_a_dynamic_length_as_a_question_mark(storage: ModelStorage) -> None:
    (port,) = storage.inputs
    text = shown(replace(storage, inputs=(replace(port, shape=(1, 256, -1)),)))
    assert row(text, "in") == "in ids int32 1×256×?"


def test_operators_without_weights_are_counted(storage: ModelStorage) -> None:
    assert "1 UnaryOp(tanh)" in shown(storage)


def test_the_weight_file_is_mentioned(converter: Converter, mixed: Path) -> None:
    storage = read_storage(converter(mixed, "--saveExternalData=1"))
    assert "in the .weight file beside it" in " ".join(shown(storage).split())


def test_names_from_the_file_cannot_steer_the_terminal(storage: ModelStorage) -> None:
    operators = tuple(replace(operator, name=f"\x1b[2J[bold]{operator.name}") for operator in storage.operators)
    text = shown(replace(storage, operators=operators))
    assert "\x1b" not in text
    assert r"\x1b[2J[bold]" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_fit_the_terminal(storage: ModelStorage, width: int) -> None:
    assert max(map(len, shown(storage, width).splitlines())) <= width
