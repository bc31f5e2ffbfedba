"""Planted faults are found at the operator that has them, and sound models are blamed for nothing."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sa3_convert.cli.comparison_tables import render_bisect
from sa3_convert.errors import ModelFileError
from sa3_convert.lab.bisect.bisect import bisect
from sa3_convert.lab.bisect.walk import BisectResult, limit_db
from sa3_convert.mnn.converter import mnn_from_onnx
from sa3_convert.recipe import ComponentRecipe
from tests.lab.bisect.graphs import Net, Weights, feeds, network, weights, write

Build = Callable[[Net], str]


def bisected(
    folder: Path,
    *,
    build: Build = network,
    change: Callable[[Weights], None] = lambda constants: None,
    memory_limit: int = 1 << 30,
    **recipe: Any,
) -> BisectResult:
    """Bisect a network against the conversion of itself with changed weights."""
    right, wrong = weights(), weights()
    change(wrong)
    reference = write(folder / "reference.onnx", build, right)
    source = write(folder / "changed.onnx", build, wrong)
    target = folder / "target.mnn"
    mnn_from_onnx(source, target, ComponentRecipe.model_validate({"floor_db": 1, **recipe}))
    return bisect(reference, target, feeds(), threads=1, memory_limit=memory_limit)


def blamed(result: BisectResult) -> str:
    assert result.suspect is not None, result.verdict()
    return result.suspect.name


INT8 = {"weights": {"bits": 8}}


@pytest.mark.parametrize("recipe", [{}, INT8, {"weights": {"bits": 4}}], ids=["fp32", "int8", "int4"])
def test_a_sound_model_is_blamed_for_nothing(tmp_path: Path, recipe: dict[str, Any]) -> None:
    result = bisected(tmp_path, **recipe)
    assert result.suspect is None, result.verdict()
    assert "No operator makes more error than its storage explains" in result.verdict()
    assert {"q", "k", "logits", "down", "conv"} <= {o.name for o in result.operators}


def set_rows(constants: Weights, name: str, value: float) -> None:
    constants[name][:2] = value


def scale(constants: Weights, name: str, factor: float) -> None:
    constants[name] = constants[name] * np.float32(factor)


def shuffle(constants: Weights, name: str) -> None:
    constants[name] = np.roll(constants[name], 1, axis=0)


def transpose(constants: Weights, name: str) -> None:
    constants[name] = np.ascontiguousarray(constants[name].T)


PLANTED: dict[str, tuple[str, Callable[[Weights], None]]] = {
    "rows of a weight are zero": ("q", lambda w: set_rows(w, "q.weight", 0)),
    "a weight is transposed": ("k", lambda w: transpose(w, "k.weight")),
    "a weight's rows are in the wrong order": ("down", lambda w: shuffle(w, "down.weight")),
    "a weight beside a name that moved": ("up", lambda w: scale(w, "up.weight", 1.2)),
    "a weight of another scale": ("time", lambda w: scale(w, "time.weight", 1.1)),
    "a bias of the wrong sign": ("in", lambda w: scale(w, "in.bias", -1)),
    "a wrong scale": ("scaled", lambda w: scale(w, "scale", 1.05)),
    "a norm's gamma": ("norm", lambda w: shuffle(w, "norm.gamma")),
    "a norm's epsilon": ("norm", lambda w: scale(w, "norm.eps", 1e6)),
    "a convolution's magnitude": ("conv", lambda w: shuffle(w, "conv.g")),
    "a convolution's kernel": ("conv", lambda w: set_rows(w, "conv.v", 1)),
    "a frequency": ("phase", lambda w: scale(w, "frequencies", 1.01)),
}


@pytest.mark.parametrize("what", PLANTED)
@pytest.mark.parametrize("recipe", [{}, INT8], ids=["fp32", "int8"])
def test_a_broken_constant_is_found_at_its_operator(tmp_path: Path, what: str, recipe: dict[str, Any]) -> None:
    operator, change = PLANTED[what]
    result = bisected(tmp_path, change=change, **recipe)
    suspect = result.suspect
    assert suspect is not None
    # Where the operator's own name was fused away, the piece that it is part of is named.
    assert suspect.name.split(".")[0] == operator, result.verdict()


def test_a_fault_in_the_linear_whose_name_moved_is_found_there(tmp_path: Path) -> None:
    result = bisected(tmp_path, change=lambda w: shuffle(w, "gate.weight"))
    assert blamed(result).startswith("gate"), result.verdict()


def test_an_infinite_weight_is_found_although_everything_after_it_is_nan(tmp_path: Path) -> None:
    result = bisected(tmp_path, change=lambda w: set_rows(w, "k.weight", np.inf))
    assert blamed(result) == "k"


def test_a_half_precision_fourier_table_is_found_by_what_it_does_later(tmp_path: Path) -> None:
    result = bisected(tmp_path, floats="fp16")
    assert blamed(result) == "phase"
    assert result.amplifier is not None
    assert result.amplifier.name == "cos"
    assert "which cos turns into" in result.verdict()


def test_a_gain_that_was_rounded_with_the_other_half_floats_is_no_fault(tmp_path: Path) -> None:
    def rounded(constants: Weights) -> None:
        constants["norm.gamma"] = constants["norm.gamma"].astype(np.float16).astype(np.float32)

    result = bisected(tmp_path, change=rounded, floats="fp16")
    norm = next(o for o in result.operators if o.name == "norm")
    assert norm.stored == "fp16"
    assert 60 < norm.own_error_db < 90
    assert not norm.is_faulty


def unfused_weight_norm(net: Net) -> str:
    """As the exporter writes it: MNN reduces over all axes when they are an input."""
    net("Transpose", "channels", net("Add", "shifted", "x", "t"), perm=[0, 2, 1])
    norm = net("ReduceL2", "conv.norm", "conv.v", "in_kernel", keepdims=1)
    net("Mul", "conv.weight", "conv.v", net("Div", "conv.ratio", "conv.g", norm))
    return net("Conv", "conv", "channels", "conv.weight", "conv.bias", pads=[1, 1])


def where_with_small_else(net: Net) -> str:
    """The else branch is read out of bounds when it needs broadcasting."""
    net("Add", "in", net("MatMul", "in.product", "x", "in.weight"), "in.bias")
    net("Where", "masked", net("Greater", "positive", "in", "t"), "in", net("Mul", "small", "in.bias", "t"))
    return net("Transpose", "channels", "masked", perm=[0, 2, 1])


def rounding(net: Net) -> str:
    """MNN rounds halves away from zero."""
    net("Round", "rounded", net("Mul", "halves", net("Sign", "sign", "x"), "half"))
    return net("Mul", "sum", net("Add", "shifted", "rounded", "x"), "t")


@pytest.mark.parametrize(
    ("build", "operator"), [(unfused_weight_norm, "conv"), (where_with_small_else, "masked"), (rounding, "rounded")]
)
def test_what_mnn_gets_wrong_by_itself_is_found(tmp_path: Path, build: Build, operator: str) -> None:
    def half(constants: Weights) -> None:
        constants["half"] = np.array(0.5, np.float32)

    right = weights()
    half(right)
    reference = write(tmp_path / "reference.onnx", build, right)
    mnn_from_onnx(reference, tmp_path / "target.mnn", ComponentRecipe(floor_db=1))
    result = bisect(reference, tmp_path / "target.mnn", feeds(), threads=1)
    assert blamed(result) == operator, result.verdict()


def test_a_name_that_moved_to_another_value_is_reported_as_not_comparable(tmp_path: Path) -> None:
    result = bisected(tmp_path)
    # The converter applies the activation in front of the reshape that carries the linear's name.
    assert "gate" in result.incomparable
    assert "norm.root" in result.incomparable  # fused into the norm


def test_the_result_does_not_depend_on_how_much_is_held_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = bisected(tmp_path / "a", change=lambda w: shuffle(w, "down.weight"))
    pieces = bisected(tmp_path / "b", change=lambda w: shuffle(w, "down.weight"), memory_limit=1)
    assert pieces == whole


def test_the_verdict_names_both_operators_and_the_limit(tmp_path: Path) -> None:
    result = bisected(tmp_path, change=lambda w: shuffle(w, "q.weight"))
    verdict = result.verdict()
    assert "q (" in verdict
    assert "MatMul" in verdict
    assert "Convolution" in verdict
    assert "fp32 allows 90.0 dB" in verdict


def test_the_table_shows_the_neighbourhood_and_marks_the_suspect(tmp_path: Path) -> None:
    result = bisected(tmp_path, change=lambda w: shuffle(w, "down.weight"))
    console = Console(file=io.StringIO(), width=160)
    console.print(render_bisect(result))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "▶ down" in shown
    assert "residual" in shown
    assert "not comparable" in shown


def test_the_json_holds_every_operator(tmp_path: Path) -> None:
    result = bisected(tmp_path)
    data = result.to_data()
    assert data["suspect"] is None
    assert [o["name"] for o in data["operators"]] == [o.name for o in result.operators]


def test_damaged_files_are_input_errors(tmp_path: Path) -> None:
    reference = write(tmp_path / "reference.onnx", network, weights())
    target = tmp_path / "target.mnn"
    mnn_from_onnx(reference, target, ComponentRecipe(floor_db=1))
    target.write_bytes(target.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match=r"target\.mnn"):
        bisect(reference, target, feeds())
    reference.write_bytes(b"\x00" * 10)
    with pytest.raises(ModelFileError, match=r"reference\.onnx"):
        bisect(reference, target, feeds())


def test_another_model_is_refused(tmp_path: Path) -> None:
    reference = write(tmp_path / "reference.onnx", network, weights())
    source = write(tmp_path / "source.onnx", lambda net: net("Mul", "double", "x", "scale"), weights(), inputs=("x",))
    mnn_from_onnx(source, tmp_path / "target.mnn", ComponentRecipe(floor_db=1))
    with pytest.raises(ModelFileError, match="has the inputs x"):
        bisect(reference, tmp_path / "target.mnn", feeds())


@pytest.mark.parametrize(("stored", "limit"), [("fp32", 90), ("fp16", 60), ("int8", 36.16), ("int4", 12.08)])
def test_limits_follow_what_is_stored(stored: str, limit: float) -> None:
    assert limit_db(stored) == pytest.approx(limit)
