"""`Next: …` lines: what they name works when a shell takes the line as it is."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.cli import console
from sa3_convert.components import Component
from sa3_convert.convert import conversion
from sa3_convert.lab.planner import measuring, planner
from sa3_convert.recipe import load_recipe, recipe_file

ODD = 'it\'s a "bundle" $HOME'


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """Return which command a line calls, and with what; it is not run."""
    name, *words = shlex.split(line.removeprefix("Next: "))
    assert name == "sa3-convert"
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.name, command.make_context(command.name, words).params


def next_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: "))
    return line


@pytest.mark.parametrize(
    ("without", "expected"),
    [((), "run"), ((Component.ENCODER,), "run"), ((Component.DIT,), "inspect"), (tuple(Component)[1:], "inspect")],
)
def test_after_a_conversion_comes_what_the_bundle_can_do(
    toy_int8: Bundle,
    toy: Path,
    tmp_path: Path,
    without: tuple[Component, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = toy_int8.manifest
    kept = tuple(a for a in manifest.artifacts if a.component not in without)
    made = Bundle(toy_int8.path, manifest.model_copy(update={"artifacts": kept}))
    outcome = SimpleNamespace(bundle=made, up_to_date=False)
    monkeypatch.setattr(conversion, "convert", lambda *_: outcome)
    out = tmp_path / ODD
    assert cli.run(["convert", str(toy), "--out", str(out)]) == 0
    command, parameters = parsed(next_line(capsys))
    assert command == expected
    assert out in (parameters.get("bundle"), parameters.get("file"))


def test_an_autoencoder_alone_is_exported(
    toy_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    synthesize(tmp_path / "same", "same-s", "toy", 0, "gaussian")
    kept = tuple(a for a in toy_int8.manifest.artifacts if a.component in (Component.DECODER, Component.ENCODER))
    made = Bundle(toy_int8.path, toy_int8.manifest.model_copy(update={"artifacts": kept}))
    monkeypatch.setattr(conversion, "convert", lambda *_: SimpleNamespace(bundle=made, up_to_date=False))
    out = tmp_path / ODD
    assert cli.run(["convert", str(tmp_path / "same"), "--out", str(out)]) == 0
    command, parameters = parsed(next_line(capsys))
    assert (command, parameters["bundles"], parameters["to"]) == ("export", [out], tmp_path / f"{ODD}-published")


@pytest.mark.parametrize(("name", "folder"), [("a plan.yaml", "a plan"), ("plan", "plan-bundle")])
def test_after_a_plan_comes_its_conversion(
    name: str,
    folder: str,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = load_recipe(recipe_file(Path("int8"))).for_component(Component.DIT)
    made = SimpleNamespace(recipe=chosen, size=1, predicted_db=40.0, bound_db=41.0)
    monkeypatch.setattr(measuring, "measure", lambda *_: {})
    monkeypatch.setattr(planner, "plan_component", lambda *_: made)
    monkeypatch.setattr(console, "planned_rows", lambda _: [])
    monkeypatch.setattr(console, "planned_table", lambda *_: "")
    out = tmp_path / ODD / name
    checkpoint = tmp_path / "a checkpoint"
    checkpoint.symlink_to(toy)
    run = ("plan", str(checkpoint), "--component", "dit", "--target-mib", "1")
    assert cli.run([*run, "--out", str(out)]) == 0
    command, parameters = parsed(next_line(capsys))
    assert (command, parameters["checkpoint"]) == ("convert", str(checkpoint))
    assert (parameters["recipe"], parameters["out"]) == (out, tmp_path / ODD / folder)
    assert cli.run([*run, "--out", "-"]) == 0
    assert "Next: " not in capsys.readouterr().out
