"""The command: which engines serve, with what, and who is told."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli.app import run
from sa3_convert.runtime.placement import engine_for
from sa3_convert.serve.worker import Served


@pytest.fixture
def asked(toy_int8: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return what would be served, by arguments; or the exit code."""

    def ask(*arguments: str) -> Mapping[str, Served] | int:
        found: list[Mapping[str, Served]] = []
        monkeypatch.setattr("sa3_convert.serve.server.serve", lambda served, *_, **__: found.append(served))
        code = run(["serve", str(toy_int8.path), "-o", str(tmp_path / "out"), *arguments])
        return found[0] if found else code

    return ask


def test_the_engine_is_the_one_that_run_takes_and_is_told_in_the_same_words(
    asked: Any, toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (one,) = asked().values()
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("Engine "))
    assert (one.engine, one.chosen) == engine_for(toy_int8)
    how = ["--prompt", "p", "--seconds", "1", "--steps", "1", "-o", str(tmp_path / "a.wav")]
    assert run(["run", str(toy_int8.path), *how]) == 0
    assert said in capsys.readouterr().err.splitlines()


def test_an_engine_that_is_named_and_chosen_serves_once(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3_convert.cli.generate.engine_for", lambda *_, **__: ("onnxruntime", "it is Sunday"))
    both = asked("--engine", "mnn", "--engine", "auto", "--engine", "onnxruntime")
    assert [(one.engine, one.chosen) for one in both.values()] == [("mnn", None), ("onnxruntime", "it is Sunday")]
    assert [name.rpartition(" ")[2] for name in both] == ["(mnn)", "(onnxruntime)"]


@pytest.mark.parametrize(
    "arguments", [["--engine", "onnxruntime", "--memory", "low"], ["--engine", "onnxruntime", "--device", "vulkan"]]
)
def test_settings_that_no_engine_has_are_refused(asked: Any, arguments: Sequence[str]) -> None:
    assert asked(*arguments) == 2


def test_settings_of_one_engine_are_not_asked_of_those_beside_it(asked: Any) -> None:
    (chosen,) = asked("--memory", "low").values()
    assert (chosen.engine, chosen.options["memory"]) == ("mnn", "low")
    low, other = asked("--engine", "mnn", "--engine", "onnxruntime", "--memory", "low").values()
    assert (low.options["memory"], other.engine, "memory" in other.options) == ("low", "onnxruntime", False)
